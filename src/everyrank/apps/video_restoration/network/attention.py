"""Temporal mutual self-attention inside 3-D windows (VRT, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everyrank.apps.video_restoration.network.chunked_attention import Region, chunked_attention
from everyrank.apps.video_restoration.network.position import relative_index, sine_code
from everyrank.apps.video_restoration.network.warping import precise
from everyrank.apps.video_restoration.network.windows import Triple, WindowGrid


class WindowAttention(nn.Module):
    """Self-attention inside a window and, if ``mutual``, attention of each of its two frames into the other.

    Args:
        dim: Channels.
        window: Window (frames, height, width); two frames for mutual attention.
        num_heads: Heads.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        qk_scale: Factor on the scores, ``head_dim ** -0.5`` if None.
        mutual: Whether to add mutual attention.
    """

    position_bias: Tensor
    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window: Triple,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        mutual: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.mutual = mutual
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_index(window))
        if mutual:
            self.register_buffer("position_bias", sine_code(window[1], window[2], dim))
        # the order is that of published checkpoints, whose optimizer states are numbered by it
        self.qkv_self = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(2 * dim if mutual else dim, dim)
        if mutual:
            self.qkv_mut = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def position_table(self, tokens: int) -> Tensor:
        """Return the position bias (heads, tokens, tokens) of a window of ``tokens``."""
        index = self.relative_position_index[:tokens, :tokens].reshape(-1)
        return self.relative_position_bias_table.t().index_select(1, index).view(-1, tokens, tokens)

    def forward(self, x: Tensor, grid: WindowGrid) -> Tensor:
        """Map windows (B, nD, nH, nW, tokens, C) to the same shape."""
        out = self._attend(self.qkv_self(x), grid, self.position_table(x.shape[-2]))
        if self.mutual:
            mutual = self._attend(self.qkv_mut(x + self.position_bias.repeat(1, 2, 1)), grid, None)
            out = torch.cat((mutual, out), dim=-1)
        return self.proj(out)

    def _attend(self, qkv: Tensor, grid: WindowGrid, bias: Tensor | None) -> Tensor:
        """(B, nD, nH, nW, tokens, 3 C) to (B, nD, nH, nW, tokens, C); mutual if there is no position ``bias``."""
        attend = chunked if qkv.device.type == "cpu" else fused
        out = attend(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            bias,
            list(grid.regions(spatial=bias is None, device=qkv.device)),
            self.scale,
            frames=2 if bias is None else 1,
        )
        return out.flatten(-2)


def chunked(qkv: Tensor, bias: Tensor | None, regions: list[Region], scale: float, *, frames: int) -> Tensor:
    """Do :func:`chunked_attention` in float32 at least, under autocast too.

    For the CPU, whose fused kernel takes three to five times as long and has no gradient for the bias, and whose
    unfused path keeps all scores.
    """
    with torch.autocast("cpu", enabled=False):
        out = chunked_attention(precise(qkv), None if bias is None else precise(bias), regions, scale, frames=frames)
    return out.to(qkv.dtype)


def fused(qkv: Tensor, bias: Tensor | None, regions: list[Region], scale: float, *, frames: int) -> Tensor:
    """Do what :func:`chunked_attention` does with PyTorch's fused kernel, for all windows of a region together."""
    q, k, v = qkv.unflatten(4, (frames, -1)).permute(6, 0, 1, 2, 3, 4, 7, 5, 8).unbind(0)
    if frames > 1:
        q = q.flip(4)
    out = torch.empty_like(q)
    for where, mask in regions:
        at = (slice(None), *where)
        extra = mask if bias is None else bias if mask is None else bias + mask
        if extra is not None:
            extra = extra.to(q.dtype).view(1, -1, *extra.shape[-2:])
        queries, keys, values = (t[at].flatten(0, 4) for t in (q, k, v))
        answers = F.scaled_dot_product_attention(queries, keys, values, attn_mask=extra, scale=scale)
        out[at] = answers.view(out[at].shape)
    return out.transpose(-2, -3).flatten(4, 5)
