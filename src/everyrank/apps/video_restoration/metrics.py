"""PSNR and SSIM as the field computes them: on 8-bit values, without a border, of RGB or of Y alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("psnr", "ssim", "psnr_y", "ssim_y")


def luma(frames: Tensor) -> Tensor:
    """Y of ITU-R BT.601 in studio range (16 to 235) of RGB (N, 3, H, W) in 0 .. 255: (N, 1, H, W), not rounded."""
    weights = frames.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1)
    return (frames * weights).sum(1, keepdim=True) / 255.0 + 16.0


def psnr(a: Tensor, b: Tensor, peak: float = 255.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of N images (N, C, H, W); infinite where they are equal."""
    mse = (a - b).square().flatten(1).mean(1)
    return 10.0 * torch.log10(peak**2 / mse)


def ssim(a: Tensor, b: Tensor, peak: float = 255.0) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each of N images (N, C, H, W), the mean over pixels and channels.

    The window is a Gaussian of 11 pixels and standard deviation 1.5; only whole windows count.
    """
    channels = a.shape[1]
    taps = torch.exp(-0.5 * ((torch.arange(11, dtype=a.dtype, device=a.device) - 5) / 1.5) ** 2)
    taps = taps / taps.sum()
    across, down = taps.view(1, 1, 1, 11).repeat(channels, 1, 1, 1), taps.view(1, 1, 11, 1).repeat(channels, 1, 1, 1)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, across, groups=channels), down, groups=channels)

    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    score = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def frame_metrics(restored: Tensor, sharp: Tensor, border: int = 0) -> dict[str, list[float]]:
    """Return the metrics of each frame.

    Args:
        restored: Frames (T, 3, H, W) in [0, 1]; they are rounded to 8 bits.
        sharp: What they should be.
        border: Pixels left out at each side.
    """
    a, b = (x.detach().double().clamp(0, 1).mul(255.0).round() for x in (restored, sharp))
    if border:
        a, b = (x[..., border:-border, border:-border] for x in (a, b))
    ya, yb = (luma(a), luma(b)) if a.shape[1] == 3 else (a, b)
    values = (psnr(a, b), ssim(a, b), psnr(ya, yb), ssim(ya, yb))
    return {name: value.tolist() for name, value in zip(METRICS, values, strict=True)}


def mean(values: list[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
