"""Metrics against scikit-image, resizing against MATLAB's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from everyrank.apps.video_restoration.data.degradation import degrade, gaussian_blur, imresize
from everyrank.apps.video_restoration.metrics import frame_metrics

skimage_metrics = pytest.importorskip("skimage.metrics")


@pytest.mark.parametrize("border", [0, 3])
def test_metrics_are_those_of_scikit_image(border: int) -> None:
    generator = torch.Generator().manual_seed(1)
    sharp = torch.rand(2, 3, 40, 52, generator=generator)
    restored = sharp + 0.1 * torch.randn(sharp.shape, generator=generator)  # also beyond [0, 1]
    found = frame_metrics(restored, sharp, border)
    for i in range(2):
        a, b = (
            (x[i].double().clamp(0, 1) * 255).round().numpy().transpose(1, 2, 0).astype(np.uint8)
            for x in (restored, sharp)
        )
        if border:
            a, b = (x[border:-border, border:-border] for x in (a, b))
        how = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        assert found["psnr"][i] == pytest.approx(
            skimage_metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9
        )
        ssim = skimage_metrics.structural_similarity(a.astype(float), b.astype(float), channel_axis=2, **how)
        assert found["ssim"][i] == pytest.approx(ssim, abs=1e-7)
        ya, yb = (x.astype(float) @ [65.481, 128.553, 24.966] / 255 + 16 for x in (a, b))
        psnr_y = skimage_metrics.peak_signal_noise_ratio(yb, ya, data_range=255)
        assert found["psnr_y"][i] == pytest.approx(psnr_y, abs=1e-9)
        assert found["ssim_y"][i] == pytest.approx(skimage_metrics.structural_similarity(ya, yb, **how), abs=1e-7)


def test_luma_is_that_of_bt_601() -> None:
    from skimage.color import rgb2ycbcr

    from everyrank.apps.video_restoration.metrics import luma

    image = torch.rand(1, 3, 5, 7, dtype=torch.float64)
    expected = rgb2ycbcr(image[0].permute(1, 2, 0).numpy())[..., 0]
    np.testing.assert_allclose(luma(image * 255)[0, 0].numpy(), expected, atol=1e-2)


def _kernel(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def _resized(row: list[float], scale: float) -> list[float]:
    """MATLAB's definition for one row, by summing over a mirrored row that never ends."""
    n, s = len(row), min(scale, 1.0)
    out = []
    for i in range(1, math.ceil(n * scale) + 1):
        u = i / scale + 0.5 * (1 - 1 / scale)
        taps = range(math.floor(u - 4 / s) - 1, math.ceil(u + 4 / s) + 2)
        weights = [s * _kernel(s * (u - t)) for t in taps]
        values = [row[m if (m := (t - 1) % (2 * n)) < n else 2 * n - 1 - m] for t in taps]
        out.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return out


@pytest.mark.parametrize("scale", [0.25, 0.5, 1 / 3, 2.0, 4.0, 1.0])
def test_resizing_is_matlabs(scale: float) -> None:
    rows = torch.rand(3, 13, dtype=torch.float64)
    expected = torch.tensor([_resized(row.tolist(), scale) for row in rows], dtype=torch.float64)
    tall = torch.tensor([_resized(column.tolist(), scale) for column in expected.T], dtype=torch.float64).T
    torch.testing.assert_close(imresize(rows, scale), tall, atol=1e-12, rtol=0)


def test_blur_keeps_the_mean_of_a_flat_frame_and_spreads_a_point() -> None:
    flat = torch.full((1, 3, 20, 20), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, 1.6), flat)
    point = torch.zeros(1, 3, 21, 21)
    point[..., 10, 10] = 1
    blurred = gaussian_blur(point, 1.6)
    assert blurred.sum().item() == pytest.approx(3.0, abs=1e-5)
    assert blurred[0, 0, 10, 12] / blurred[0, 0, 10, 10] == pytest.approx(math.exp(-0.5 * (2 / 1.6) ** 2), rel=1e-5)


def test_made_frames_have_8_bit_values() -> None:
    low = degrade(torch.rand(2, 3, 16, 16), "bicubic", scale=4, blur_sigma=1.6)
    assert low.shape == (2, 3, 4, 4)
    torch.testing.assert_close((low * 255).round(), low * 255, atol=1e-4, rtol=0)
