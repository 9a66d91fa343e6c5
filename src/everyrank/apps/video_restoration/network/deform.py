"""Deformable convolution (DCN v2, arXiv 1811.11168) guided by optical flow (BasicVSR++, arXiv 2104.13371)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from everyrank.apps.video_restoration.network.chunked_deform import chunked_deform
from everyrank.apps.video_restoration.network.warping import normalise, precise, sample


@lru_cache(maxsize=1)
def has_torchvision() -> bool:
    """Tell whether torchvision's fused deformable convolution can be used."""
    return find_spec("torchvision") is not None


def deform_conv2d(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Modulated deformable convolution of stride 1 that keeps the frame's size.

    ``torchvision.ops.deform_conv2d`` if torchvision is installed, otherwise :func:`sampled_deform_conv2d`.

    Args:
        x: Features (N, C, H, W).
        offset: (N, 2 * groups * k * k, H, W), pairs (dy, dx) in pixels, for each deformable group and each tap.
        weight: (out, C / conv_groups, k, k); the number of convolution groups follows from ``C``.
        bias: (out,) or None.
        mask: (N, groups * k * k, H, W), factors on the sampled values.

    Returns:
        (N, out, H, W).
    """
    if has_torchvision():
        from torchvision.ops import deform_conv2d as fused

        return fused(x, offset, weight, bias, padding=weight.shape[-1] // 2, mask=mask)
    return sampled_deform_conv2d(x, offset, weight, bias, mask)


def sampled_deform_conv2d(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Do :func:`deform_conv2d` with ``grid_sample``, which has the same rule at the border: zeros outside."""
    n, channels, height, width = x.shape
    out_channels, per_group, kernel, _ = weight.shape
    taps = kernel * kernel
    groups = mask.shape[1] // taps
    shift = precise(offset).reshape(n * groups, taps, 2, height, width)  # it may be channels-last
    reach = torch.arange(kernel, device=x.device, dtype=shift.dtype) - kernel // 2
    rows = torch.arange(height, device=x.device, dtype=shift.dtype)
    columns = torch.arange(width, device=x.device, dtype=shift.dtype)
    y = shift[:, :, 0] + (reach.repeat_interleave(kernel).view(-1, 1, 1) + rows.view(1, -1, 1))
    x_at = shift[:, :, 1] + (reach.repeat(kernel).view(-1, 1, 1) + columns)
    grid = normalise(x_at, y, height, width).view(n * groups, taps * height, width, 2)
    values = x.reshape(n * groups, channels // groups, height, width)
    sampled = sample(values, grid).view(n, groups, channels // groups, taps, height * width)
    sampled = sampled * mask.view(n, groups, 1, taps, height * width)
    conv_groups = channels // per_group
    columns_ = sampled.view(n, conv_groups, per_group * taps, height * width)
    out = torch.matmul(weight.view(conv_groups, out_channels // conv_groups, per_group * taps), columns_)
    out = out.view(n, out_channels, height, width)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


class FlowGuidedDeformConv(nn.Module):
    """Parallel warping's alignment: features of neighbouring frames are sampled around where the flow points.

    Args:
        dim: Channels of one frame's features.
        num_neighbours: How many frames on one side are aligned together (``pa_frames // 2``); their features are
            stacked along channels and each is one group of the convolution.
        deformable_groups: Groups of channels with their own offsets.
        max_residue: The largest offset from the flow, in pixels.
    """

    def __init__(self, dim: int, *, num_neighbours: int, deformable_groups: int, max_residue: float) -> None:
        super().__init__()
        self.max_residue = max_residue
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3))
        self.bias = nn.Parameter(torch.zeros(dim))
        bound = 1.0 / math.sqrt(dim * 9)
        nn.init.uniform_(self.weight, -bound, bound)
        last = nn.Conv2d(dim, 27 * deformable_groups, 3, padding=1)
        nn.init.zeros_(last.weight)  # training starts from the flow alone
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.conv_offset = nn.Sequential(
            nn.Conv2d((1 + num_neighbours) * dim + 2 * num_neighbours, dim, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            last,
        )

    def forward(self, sources: Tensor, warped: Tensor, current: Tensor, flows: Sequence[Tensor]) -> Tensor:
        """Align ``sources`` with the current frame.

        Args:
            sources: Features of the neighbours (N, num_neighbours * C, H, W).
            warped: The same, warped by the flows.
            current: Features of the frame to align with (N, C, H, W).
            flows: For each neighbour, the flow (N, 2, H, W) from the current frame to it.

        Returns:
            Aligned features (N, C, H, W).
        """
        inputs = torch.cat((warped, current, *flows), dim=1).contiguous(memory_format=torch.channels_last)
        features = self.conv_offset[:-1](inputs)
        guide = torch.cat(list(flows), dim=1)
        last: Any = self.conv_offset[-1]
        if sources.device.type == "cpu" and not has_torchvision():
            with torch.autocast("cpu", enabled=False):
                aligned = chunked_deform(
                    precise(features),
                    precise(sources),
                    precise(guide),
                    precise(last.weight),
                    precise(last.bias),
                    precise(self.weight),
                    precise(self.bias),
                    self.max_residue,
                )
            return aligned.to(sources.dtype)
        return self._sample(sources, last(features), guide)

    def _sample(self, sources: Tensor, raw: Tensor, guide: Tensor) -> Tensor:
        """Convolve at the flows ``guide`` (N, 2 * neighbours, H, W) plus what ``raw`` says, weighted by its mask."""
        num_offsets = raw.shape[1] // 3 * 2
        residue = self.max_residue * torch.tanh(raw[:, :num_offsets])
        # each neighbour owns an equal share of the offsets, which come in pairs (dy, dx); flows are (dx, dy)
        n, channels, height, width = guide.shape
        around = guide.view(n, channels // 2, 1, 2, height, width).flip(3)
        offset = residue.view(n, channels // 2, -1, 2, height, width) + around
        mask = torch.sigmoid(raw[:, num_offsets:])
        return deform_conv2d(sources, offset.view(n, num_offsets, height, width), self.weight, self.bias, mask)
