"""The first and last layers of VRT: convolutions on single frames, and three ways back to pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 64


class FrameConv(nn.Conv3d):
    """A (1, 3, 3) convolution of each frame, run as a 2-D one. Input and output are (N, C, H, W) frames."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=(1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve frames (N, C, H, W)."""
        return F.conv2d(x, self.weight.squeeze(2), self.bias, padding=1)


class Upsample(nn.ModuleDict):
    """Convolutions and pixel shuffles to a scale that is a power of two, or 3; (N, C, H, W) frames in and out.

    The keys are the places the layers have in published checkpoints, where shuffles and activations count too.
    """

    def __init__(self, scale: int, features: int) -> None:
        factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        layers = {str(5 * i): FrameConv(features, f * f * features) for i, f in enumerate(factors)}
        super().__init__(layers | {str(5 * len(factors)): FrameConv(features, features)})
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge frames."""
        *shuffled, last = self.values()
        for conv, factor in zip(shuffled, self.factors, strict=True):
            x = F.leaky_relu_(F.pixel_shuffle(conv(x), factor), 0.1)
        return last(x)


def enlarge(x: Tensor, before: nn.Module, upsample: nn.Module, last: nn.Module) -> Tensor:
    """Super-resolution: features (N, C, h, w) to frames (N, out, scale h, scale w).

    Without gradients, frames go one after the other: the widest feature maps of the network are here, and nothing is
    gained by holding those of all frames at once.
    """

    def frames(part: Tensor) -> Tensor:
        return last(upsample(before(part)))

    if torch.is_grad_enabled() or x.shape[0] == 1:
        return frames(x)
    return torch.cat([frames(part) for part in x.split(1)])


def fuse(x: Tensor, linear: nn.Module, last: nn.Module) -> Tensor:
    """Frame interpolation: the features of all frames (B, D, C, H, W) to one new frame (B, out, H, W)."""
    fused = F.leaky_relu(linear(x.flatten(1, 2)), 0.2)
    return last(F.pad(fused, (3, 3, 3, 3), mode="reflect"))
