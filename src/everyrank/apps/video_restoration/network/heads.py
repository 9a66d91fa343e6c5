"""The first and last layers of VRT: convolutions on single frames, and three ways back to pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 64
SLOPE = 0.1  # of the leaky ReLU after a pixel shuffle


class FrameConv(nn.Conv3d):
    """A (1, 3, 3) convolution of each frame, run as a 2-D one. Input and output are (N, C, H, W) frames."""

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=(1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve frames (N, C, H, W)."""
        return F.conv2d(x, self.weight.squeeze(2), self.bias, padding=1)


class Upsample(nn.ModuleDict):
    """The convolutions of pixel shuffles to a scale that is a power of two, or 3, and the one after them.

    :func:`enlarge` runs them. The keys are the places the layers have in published checkpoints, where shuffles and
    activations count too.
    """

    def __init__(self, scale: int, features: int) -> None:
        factors = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        layers = {str(5 * i): FrameConv(features, f * f * features) for i, f in enumerate(factors)}
        super().__init__(layers | {str(5 * len(factors)): FrameConv(features, features)})
        self.factors = factors

    def shuffled(self) -> tuple[list[FrameConv], FrameConv]:
        """Return the convolutions that a pixel shuffle follows, and the last one."""
        *convs, last = self.values()
        return convs, last  # type: ignore[return-value]


def enlarge(x: Tensor, before: nn.Module, upsample: Upsample, last: FrameConv) -> Tensor:
    """Super-resolution: features (N, C, h, w) to frames (N, out, scale h, scale w).

    In the published order: ``before``; for each factor a convolution, a pixel shuffle and a leaky ReLU; the last
    convolution of ``upsample``; ``last``. As no activation stands between those two, they are computed as one, on the
    small pixels (see :func:`_tail_kernel`): on the large ones, they would be half of the network's work.

    Without gradients, frames go one after the other: the widest feature maps of the network are here, and nothing is
    gained by holding those of all frames at once.
    """
    convs, smooth = upsample.shuffled()
    *early, factor = upsample.factors
    kernel, bias = _tail_kernel(smooth, last, factor)

    def frames(part: Tensor) -> Tensor:
        part = before(part.contiguous(memory_format=torch.channels_last))
        for conv, enlarged in zip(convs, early, strict=False):
            part = F.pixel_shuffle(F.leaky_relu_(conv(part), SLOPE), enlarged)
        part = F.leaky_relu_(convs[-1](part), SLOPE)
        large = F.pixel_shuffle(F.conv2d(part, kernel, bias, padding=1), factor)
        return _with_border(large, part, lambda strip: last(smooth(F.pixel_shuffle(strip, factor))))

    if torch.is_grad_enabled() or x.shape[0] == 1:
        return frames(x)
    return torch.cat([frames(part) for part in x.split(1)])


def _tail_kernel(smooth: FrameConv, last: FrameConv, factor: int) -> tuple[Tensor, Tensor]:
    """The 3x3 convolution that does, before the pixel shuffle, what ``smooth`` and then ``last`` do after it.

    Two 3x3 convolutions in a row are one of 5x5. A shuffled pixel that is ``q`` large pixels from the first of a group
    of ``factor`` is in the small pixel ``q // factor`` further on, in the channel ``q % factor``; the 5x5 kernel,
    placed at each of the ``factor * factor`` pixels of a group, reaches from one small pixel before to one after.

    Returns:
        Kernel (out * factor**2, features * factor**2, 3, 3) and bias (out * factor**2,).
    """
    with torch.autocast(last.weight.device.type, enabled=False):
        first, second = smooth.weight.squeeze(2), last.weight.squeeze(2)
        both = F.conv_transpose2d(first.transpose(0, 1), second.transpose(0, 1)).transpose(0, 1)
        placed = [
            F.pad(both, (factor - 2 + x, 2 * factor - 3 - x, factor - 2 + y, 2 * factor - 3 - y))
            for y in range(factor)
            for x in range(factor)
        ]
        kernel = torch.stack(placed, 1).view(-1, second.shape[1], 3, factor, 3, factor)
        bias = torch.mv(second.sum((2, 3)), smooth.bias) + last.bias
        return kernel.permute(0, 1, 3, 5, 2, 4).flatten(1, 3), bias.repeat_interleave(factor * factor)


def _with_border(large: Tensor, small: Tensor, tail: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace the outermost pixels of ``large`` by what ``tail`` makes of ``small``.

    They are the only ones that know of the two convolutions: the second sees zeros outside the frame, and not what the
    first would give there.
    """
    rows = [tail(small[:, :, :2])[:, :, :1], tail(small[:, :, -2:])[:, :, -1:]]
    columns = [tail(small[:, :, :, :2])[:, :, 1:-1, :1], tail(small[:, :, :, -2:])[:, :, 1:-1, -1:]]
    middle = torch.cat((columns[0], large[:, :, 1:-1, 1:-1], columns[1]), 3)
    return torch.cat((rows[0], middle, rows[1]), 2)


def fuse(x: Tensor, linear: nn.Module, last: nn.Module) -> Tensor:
    """Frame interpolation: the features of all frames (B, D, C, H, W) to one new frame (B, out, H, W)."""
    fused = F.leaky_relu(linear(x.flatten(1, 2)), 0.2)
    return last(F.pad(fused, (3, 3, 3, 3), mode="reflect"))
