"""Making low-quality frames: bicubic as MATLAB's ``imresize``, blur, noise."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5 (IEEE Trans. ASSP 29, 1981), the one of MATLAB's ``imresize``."""
    a = x.abs()
    near = 1.5 * a**3 - 2.5 * a**2 + 1
    far = -0.5 * a**3 + 2.5 * a**2 - 4 * a + 2
    return near * (a <= 1) + far * ((a > 1) & (a <= 2))


@lru_cache(maxsize=64)
def resize_matrix(length: int, scale: float) -> Tensor:
    """Return the matrix (ceil(length * scale), length) that resizes a row, float64.

    As MATLAB: the kernel is widened by 1 / scale when shrinking (antialiasing), weights of each output sum to one, and
    the border is mirrored with the edge pixel repeated.
    """
    out = int(-(-length * scale // 1)) if length * scale % 1 > 1e-9 else round(length * scale)
    shrink = min(scale, 1.0)
    width = 4.0 / shrink
    centre = (torch.arange(1, out + 1, dtype=torch.float64)) / scale + 0.5 * (1 - 1 / scale)
    left = torch.floor(centre - width / 2)
    taps = left.unsqueeze(1) + torch.arange(int(width) + 2, dtype=torch.float64)
    weights = shrink * cubic(shrink * (centre.unsqueeze(1) - taps))
    weights = weights / weights.sum(1, keepdim=True)
    mirrored = (taps.long() - 1) % (2 * length)
    source = torch.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    return torch.zeros(out, length, dtype=torch.float64).scatter_add_(1, source, weights)


def imresize(frames: Tensor, scale: float) -> Tensor:
    """Resize (..., H, W) as MATLAB's ``imresize(image, scale, 'bicubic')`` does; the result is not clamped."""
    rows = resize_matrix(frames.shape[-2], scale).to(frames)
    columns = resize_matrix(frames.shape[-1], scale).to(frames)
    return rows @ frames @ columns.T


def gaussian_blur(frames: Tensor, sigma: float) -> Tensor:
    """Blur (T, C, H, W) with a Gaussian cut at 3 sigma; the border is reflected."""
    radius = max(1, int(3 * sigma + 0.5))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=frames.dtype) / sigma) ** 2)
    taps = (taps / taps.sum()).to(frames)
    channels = frames.shape[1]
    padded = F.pad(frames, (radius, radius, radius, radius), mode="reflect")
    across = F.conv2d(padded, taps.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(across, taps.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)


def degrade(frames: Tensor, kind: str, *, scale: int, blur_sigma: float) -> Tensor:
    """Make low-quality frames (T, C, H / scale, W / scale) of sharp ones (T, C, H, W), with 8-bit values.

    Args:
        frames: Sharp frames in [0, 1].
        kind: "bicubic", "blur" or "none"; noise is added by the dataset, for it needs the sample's generator.
        scale: Reduction of "bicubic" and, after the blur, of "blur".
        blur_sigma: Standard deviation of "blur", in pixels.
    """
    if kind == "blur":
        frames = gaussian_blur(frames, blur_sigma)
    if kind in ("bicubic", "blur") and scale > 1:
        frames = imresize(frames, 1.0 / scale)
    return frames.clamp(0, 1).mul(255.0).round().div(255.0)  # the values that an 8-bit file would keep
