"""Temporal mutual self-attention inside 3-D windows (VRT, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everyrank.apps.video_restoration.network.chunked_attention import chunked_attention
from everyrank.apps.video_restoration.network.position import relative_index, sine_code
from everyrank.apps.video_restoration.network.windows import Triple, WindowGrid


def attend(q: Tensor, k: Tensor, v: Tensor, grid: WindowGrid, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention inside each window, group by group of windows that share a mask.

    Args:
        q: Queries (B, nD, nH, nW, heads, tokens, head_dim); ``k`` and ``v`` likewise.
        k: Keys.
        v: Values.
        grid: How the windows lie in the clip.
        scale: Factor on the scores.
        bias: Position bias (heads, tokens, tokens), or None for mutual attention.

    Returns:
        (B, nD, nH, nW, heads, tokens, head_dim).
    """
    regions = list(grid.regions(spatial=bias is None, device=q.device))
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        # the fused CPU kernel has no gradient for the bias, and the unfused path keeps every score
        return chunked_attention(q, k, v, None if bias is None else bias.to(q.dtype), regions, scale)
    if len(regions) == 1:
        return _one_region(q, k, v, regions[0][1], scale, bias)
    out = torch.empty_like(q)
    for (d, h, w), mask in regions:
        out[:, d, h, w] = _one_region(q[:, d, h, w], k[:, d, h, w], v[:, d, h, w], mask, scale, bias)
    return out


def _one_region(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None) -> Tensor:
    lead = q.shape[:4]
    q, k, v = (t.reshape(-1, *t.shape[4:]) for t in (q, k, v))
    extra = mask.to(q.dtype) if mask is not None else None
    if bias is not None:
        extra = bias.to(q.dtype) if extra is None else bias.to(q.dtype) + extra
    if extra is not None:
        extra = extra.view(1, -1, *extra.shape[-2:])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, scale=scale).view(*lead, *q.shape[1:])


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

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, nD, nH, nW, tokens, 3 C) to three of (B, nD, nH, nW, heads, tokens, head_dim)."""
        heads = qkv.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.permute(5, 0, 1, 2, 3, 6, 4, 7).unbind(0)
        return q, k, v

    def position_table(self, tokens: int) -> Tensor:
        """Return the position bias (heads, tokens, tokens) of a window of ``tokens``."""
        index = self.relative_position_index[:tokens, :tokens].reshape(-1)
        return self.relative_position_bias_table[index].view(tokens, tokens, -1).permute(2, 0, 1)

    def forward(self, x: Tensor, grid: WindowGrid) -> Tensor:
        """Map windows (B, nD, nH, nW, tokens, C) to the same shape."""
        tokens = x.shape[-2]
        q, k, v = self._split(self.qkv_self(x))
        out = _join_heads(attend(q, k, v, grid, self.scale, self.position_table(tokens)))
        if self.mutual:
            q, k, v = self._split(self.qkv_mut(x + self.position_bias.repeat(1, 2, 1)))
            # frame 2 asks frame 1, whose answer stands at frame 1's place, and the other way round
            q = torch.roll(q, tokens // 2, dims=-2)
            q, k, v = _frames_as_windows(q), _frames_as_windows(k), _frames_as_windows(v)
            mutual = _join_heads(attend(q, k, v, grid, self.scale))
            mutual = mutual.unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5, 6).flatten(4, 5)
            out = torch.cat((mutual, out), dim=-1)
        return self.proj(out)


def _frames_as_windows(t: Tensor) -> Tensor:
    """(B, nD, nH, nW, heads, 2 * half, head_dim) to (B, 2 * nD, nH, nW, heads, half, head_dim)."""
    return t.unflatten(-2, (2, -1)).permute(0, 1, 5, 2, 3, 4, 6, 7).flatten(1, 2)


def _join_heads(out: Tensor) -> Tensor:
    """(B, nD, nH, nW, heads, tokens, head_dim) to (B, nD, nH, nW, tokens, C)."""
    return out.transpose(-2, -3).flatten(-2)
