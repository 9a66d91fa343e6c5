"""The blocks and stages of VRT: attention groups, reshaping between scales, parallel warping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from everyrank.apps.video_restoration.network.attention import WindowAttention
from everyrank.apps.video_restoration.network.deform import FlowGuidedDeformConv
from everyrank.apps.video_restoration.network.warping import flow_warp
from everyrank.apps.video_restoration.network.windows import Triple, WindowGrid


class GatedMlp(nn.Module):
    """GEGLU (arXiv 2002.05202): ``fc2(gelu(fc11(x)) * fc12(x))``."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc11 = nn.Linear(dim, hidden)
        self.fc12 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., out)."""
        return self.fc2(self.act(self.fc11(x)) * self.fc12(x))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a sample's whole branch with probability ``rate`` in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Scale what is kept, so that the mean stays the same."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * kept / keep


class AttentionBlock(nn.Module):
    """Windowed attention and a gated MLP, each added to its input; (B, D, H, W, C) in and out."""

    def __init__(
        self,
        dim: int,
        window: Triple,
        num_heads: int,
        *,
        shift: Triple,
        mutual: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop_path: float,
        checkpoint_attn: bool,
        checkpoint_ffn: bool,
    ) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.checkpoint_attn, self.checkpoint_ffn = checkpoint_attn, checkpoint_ffn
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads, qkv_bias=qkv_bias, qk_scale=qk_scale, mutual=mutual)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio))

    def _attention(self, x: Tensor) -> Tensor:
        grid = WindowGrid.of((x.shape[1], x.shape[2], x.shape[3]), self.window, self.shift)
        return self.drop_path(grid.merge(self.attn(grid.partition(self.norm1(x)), grid)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both branches, recomputing those marked for activation checkpointing in the backward pass."""
        recompute = self.training and torch.is_grad_enabled()
        if recompute and self.checkpoint_attn:
            x = x + checkpoint(self._attention, x, use_reentrant=False)
        else:
            x = x + self._attention(x)
        if recompute and self.checkpoint_ffn:
            return x + checkpoint(self._feed_forward, x, use_reentrant=False)
        return x + self._feed_forward(x)


class AttentionGroup(nn.Module):
    """``depth`` blocks, every second one shifted by half a window."""

    def __init__(
        self, dim: int, depth: int, window: Triple, num_heads: int, *, drop_path: Sequence[float], **block: object
    ) -> None:
        super().__init__()
        half: Triple = (window[0] // 2, window[1] // 2, window[2] // 2)
        self.blocks = nn.ModuleList(
            AttentionBlock(
                dim,
                window,
                num_heads,
                shift=half if i % 2 else (0, 0, 0),
                drop_path=drop_path[i],
                **block,  # type: ignore[arg-type]
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W, C) to the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


class ReconstructionGroup(nn.Module):
    """Self-attention blocks and a linear layer, added to the input (the stages after the seventh)."""

    def __init__(
        self, dim: int, depth: int, window: Triple, num_heads: int, *, drop_path: Sequence[float], **block: object
    ) -> None:
        super().__init__()
        self.residual_group = AttentionGroup(dim, depth, window, num_heads, drop_path=drop_path, mutual=False, **block)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, H, W, C) to the same shape."""
        return x + self.linear(self.residual_group(x))


class Fold(nn.Module):
    """Halve the frame: 2x2 pixels become channels, ordered (x, y, channel). (B, D, H, W, C) -> (B, D, H/2, W/2, 4C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Fold each 2x2 patch."""
        b, d, h, w, c = x.shape
        x = x.reshape(b, d, h // 2, 2, w // 2, 2, c).permute(0, 1, 2, 4, 5, 3, 6)
        return x.reshape(b, d, h // 2, w // 2, 4 * c)


class Unfold(nn.Module):
    """Double the frame, the inverse of :class:`Fold`: (B, D, H, W, 4C) -> (B, D, 2H, 2W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Spread channels over 2x2 pixels."""
        b, d, h, w, c = x.shape
        x = x.reshape(b, d, h, w, 2, 2, c // 4).permute(0, 1, 2, 5, 3, 4, 6)
        return x.reshape(b, d, 2 * h, 2 * w, c // 4)


def reshaping(direction: str, in_dim: int, dim: int) -> nn.Sequential:
    """Return the layers that bring features to a stage's scale; their places in the sequence name the parameters."""
    if direction == "down":
        return nn.Sequential(Fold(), nn.LayerNorm(4 * in_dim), nn.Linear(4 * in_dim, dim))
    if direction == "up":
        return nn.Sequential(Unfold(), nn.LayerNorm(in_dim // 4), nn.Linear(in_dim // 4, dim))
    return nn.Sequential(nn.Identity(), nn.LayerNorm(dim))


class Stage(nn.Module):
    """One scale of VRT: mutual and self-attention groups, then parallel warping of the neighbouring frames.

    Args:
        in_dim: Channels that come in.
        dim: Channels of the stage.
        depth: Blocks; the first ``mul_attn_ratio`` of them use mutual attention in two-frame windows.
        window: Window of the self-attention blocks.
        num_heads: Heads.
        reshape: "none", "down" or "up".
        mul_attn_ratio: Share of blocks with mutual attention.
        pa_frames: Frames aligned onto each frame (0: no warping).
        deformable_groups: Offset groups of the alignment.
        max_residue: Largest offset from the flow, in pixels of this scale.
        drop_path: Stochastic depth of each block.
        block: What :class:`AttentionBlock` takes besides.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        depth: int,
        window: Triple,
        num_heads: int,
        *,
        reshape: str,
        mul_attn_ratio: float,
        pa_frames: int,
        deformable_groups: int,
        max_residue: float,
        drop_path: Sequence[float],
        **block: object,
    ) -> None:
        super().__init__()
        self.reshape = reshaping(reshape, in_dim, dim)
        split = int(depth * mul_attn_ratio)
        pair: Triple = (2, window[1], window[2])
        self.residual_group1 = AttentionGroup(
            dim, split, pair, num_heads, drop_path=drop_path[:split], mutual=True, **block
        )
        self.linear1 = nn.Linear(dim, dim)
        self.residual_group2 = AttentionGroup(
            dim, depth - split, window, num_heads, drop_path=drop_path[split:], mutual=False, **block
        )
        self.linear2 = nn.Linear(dim, dim)
        self.reach = pa_frames // 2
        if self.reach:
            self.pa_deform = FlowGuidedDeformConv(
                dim, num_neighbours=self.reach, deformable_groups=deformable_groups, max_residue=max_residue
            )
            self.pa_fuse = GatedMlp(3 * dim, 3 * dim, dim)

    def forward(self, x: Tensor, backward: Sequence[Tensor] = (), forward: Sequence[Tensor] = ()) -> Tensor:
        """Map features (B, D, H', W', in_dim) to (B, D, H, W, dim).

        Args:
            x: Features of the stage before.
            backward: For k = 1 .. pa_frames / 2, flows (B, D-k, 2, H, W) from frame t to t+k.
            forward: For each k, flows (B, D-k, 2, H, W) from frame t+k to t.
        """
        x = self.reshape(x)
        x = self.linear1(self.residual_group1(x)) + x
        x = self.linear2(self.residual_group2(x)) + x
        if not self.reach:
            return x
        following, preceding = self._parallel_warping(x.permute(0, 1, 4, 2, 3), backward, forward)
        stacked = torch.cat((x, following.permute(0, 1, 3, 4, 2), preceding.permute(0, 1, 3, 4, 2)), dim=-1)
        return self.pa_fuse(stacked)

    def _parallel_warping(
        self, x: Tensor, backward: Sequence[Tensor], forward: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Align the following and the preceding frames onto each frame of ``x`` (B, D, C, H, W).

        All frames and both directions go through one call. A neighbour beyond the clip's ends is zeros with zero
        flow; the last frame has no following frame at all and gets zeros, as has the first no preceding one.
        """
        b, d, c, h, w = x.shape
        sources, flows = [], []
        for k in range(1, self.reach + 1):
            gap = k - 1  # how many of the d - 1 targets have no frame that far away
            empty_x, empty_flow = x.new_zeros(b, gap, c, h, w), x.new_zeros(b, gap, 2, h, w)
            after = torch.cat((x[:, k:], empty_x), 1)
            before = torch.cat((empty_x, x[:, : d - k]), 1)
            sources.append(torch.cat((after, before)).flatten(0, 1))
            flow_after = torch.cat((backward[gap], empty_flow), 1)
            flow_before = torch.cat((empty_flow, forward[gap]), 1)
            flows.append(torch.cat((flow_after, flow_before)).flatten(0, 1))
        current = torch.cat((x[:, :-1], x[:, 1:])).flatten(0, 1)
        warped = torch.cat([flow_warp(s, f) for s, f in zip(sources, flows, strict=True)], dim=1)
        aligned = self.pa_deform(torch.cat(sources, dim=1), warped, current, flows)
        after, before = aligned.view(2, b, d - 1, c, h, w)
        edge = x.new_zeros(b, 1, c, h, w)
        return torch.cat((after, edge), 1), torch.cat((edge, before), 1)
