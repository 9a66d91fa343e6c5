"""SpyNet (Ranjan and Black, arXiv 1611.00850): optical flow from coarse to fine."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everyrank.apps.video_restoration.network.warping import flow_warp

NUM_LEVELS = 6
STRIDE = 32  # frames are resized to multiples of this, so that the coarsest level has whole pixels


class FlowLevel(nn.Module):
    """Five 7x7 convolutions that correct the flow of one pyramid level."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 32, 64, 32, 16, 2)
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Conv2d(wide, narrow, 7, padding=3), nn.ReLU(inplace=True)]
        self.basic_module = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map (reference, warped neighbour, flow so far) (N, 8, H, W) to a correction (N, 2, H, W)."""
        return self.basic_module(x.contiguous(memory_format=torch.channels_last))


class SpyNet(nn.Module):
    """Flow between two frames, given at the finest four scales (1, 1/2, 1/4, 1/8)."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.basic_module = nn.ModuleList(FlowLevel() for _ in range(NUM_LEVELS))
        # the statistics of ImageNet, which the published weights were trained with
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def _pyramid(self, frames: Tensor) -> list[Tensor]:
        levels = [(frames - self.mean) / self.std]
        for _ in range(NUM_LEVELS - 1):
            levels.insert(0, F.avg_pool2d(levels[0], 2))
        return levels

    def forward(self, frames: Tensor, pairs: Tensor) -> list[Tensor]:
        """Return flows at scales 1, 1/2, 1/4 and 1/8, in pixels of each scale.

        Args:
            frames: Frames (N, 3, H, W) in [0, 1].
            pairs: Numbers of frames (2, M): flows lead from ``pairs[0]`` to ``pairs[1]``. A frame may be in several
                pairs; its pyramid is built once.

        Returns:
            Four tensors (M, 2, H // 2**k, W // 2**k).
        """
        height, width = frames.shape[-2:]
        size = (-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE)
        pyramid = self._pyramid(F.interpolate(frames, size=size, mode="bilinear", align_corners=False))
        return self._coarse_to_fine([(level[pairs[0]], level[pairs[1]]) for level in pyramid], height, width)

    def _coarse_to_fine(self, pairs: list[tuple[Tensor, Tensor]], height: int, width: int) -> list[Tensor]:
        flows: list[Tensor] = []
        flow: Tensor | None = None
        for level, (reference, neighbour) in enumerate(pairs):
            if flow is None:
                flow = reference.new_zeros(reference.shape[0], 2, *reference.shape[-2:])
            else:
                flow = F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True) * 2.0
            warped = flow_warp(neighbour, flow, padding_mode="border")
            flow = self.basic_module[level](torch.cat((reference, warped, flow), 1)) + flow
            scale = 2 ** (NUM_LEVELS - 1 - level)
            if scale <= 8:
                flows.insert(0, _resize_flow(flow, height // scale, width // scale))
        return flows


def _resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """Resize a flow and its vectors to (height, width)."""
    tall, wide = flow.shape[-2:]
    if (tall, wide) == (height, width):
        return flow
    resized = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
    return resized * resized.new_tensor([width / wide, height / tall]).view(1, 2, 1, 1)
