"""Colour jitter: the same small change of brightness, contrast, saturation and hue for all frames of a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPAN = 0.05
_LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class ColorJitter:
    """One draw, to be applied to every frame of a sample.

    Attributes:
        factors: Of brightness, contrast and saturation, around 1.
        hue: Shift of the hue, as a part of the colour circle.
        order: The order in which brightness, contrast, saturation and hue (0 to 3) are changed.
    """

    factors: tuple[float, float, float]
    hue: float
    order: tuple[int, ...]

    @classmethod
    def draw(cls, generator: torch.Generator) -> ColorJitter:
        """Draw factors of 1 - SPAN to 1 + SPAN, a shift of -SPAN to SPAN and an order."""
        order = torch.randperm(4, generator=generator).tolist()
        drawn = ((torch.rand(4, generator=generator, dtype=torch.float64) * 2 - 1) * SPAN).tolist()
        return cls((1 + drawn[0], 1 + drawn[1], 1 + drawn[2]), drawn[3], tuple(order))

    def __call__(self, frames: Tensor) -> Tensor:
        """Change RGB frames (T, 3, H, W) in [0, 1]; the result stays in [0, 1]."""
        for step in self.order:
            if step == 0:
                frames = (frames * self.factors[0]).clamp(0, 1)
            elif step == 1:
                frames = _blend(frames, _grey(frames).mean((-3, -2, -1), keepdim=True), self.factors[1])
            elif step == 2:
                frames = _blend(frames, _grey(frames), self.factors[2])
            else:
                frames = shift_hue(frames, self.hue)
        return frames


def shift_hue(frames: Tensor, shift: float) -> Tensor:
    """Turn the hue of RGB (..., 3, H, W) in [0, 1] by ``shift`` of the colour circle; HSV value and saturation stay."""
    highest, lowest = frames.amax(-3), frames.amin(-3)
    chroma = highest - lowest
    red, green, blue = frames.unbind(-3)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(
        highest == red,
        (green - blue) / safe,
        torch.where(highest == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (hue + 6 * shift) % 6
    # Smith (SIGGRAPH 1978) in closed form: each channel falls from the highest value as the hue leaves its sector
    channels = []
    for offset in (5.0, 3.0, 1.0):
        place = (hue + offset) % 6
        channels.append(highest - chroma * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, -3)


def _grey(frames: Tensor) -> Tensor:
    weights = frames.new_tensor(_LUMA).view(3, 1, 1)
    return (frames * weights).sum(-3, keepdim=True)


def _blend(frames: Tensor, other: Tensor, factor: float) -> Tensor:
    return (factor * frames + (1 - factor) * other).clamp(0, 1)
