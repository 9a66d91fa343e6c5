"""The picture of a run: one frame, and enlarged where the network changed it most, beside what one has without it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from everyrank.apps.video_restoration.extras import video_package

ZOOM = 4
"""How much the part that is shown beside the frame is enlarged, pixel by pixel."""

_GAP, _HEAD = 4, 16
_LEAST_WIDTH = 360  # of a panel: room for its title
_RED = (255, 0, 0)

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Example:
    """One frame, each image (H, W, 3) uint8.

    Attributes:
        plain: What one has without the network.
        restored: What the network makes of it.
        sharp: How it should be.
        plain_scores: PSNR in dB and SSIM of ``plain``.
        restored_scores: Of ``restored``.
    """

    plain: Image
    restored: Image
    sharp: Image
    plain_scores: tuple[float, float]
    restored_scores: tuple[float, float]


def write_picture(path: Path, example: Example, baseline: str) -> None:
    """Write a PNG in full colour: the sharp frame, and a part of the plain, the restored and the sharp one, enlarged.

    Args:
        path: Where to write it.
        example: The frame.
        baseline: What the plain image is: "bicubic" or "input".
    """
    top, left, height, width = most_changed(example.plain, example.restored)
    window = np.s_[top : top + height, left : left + width]
    frame = example.sharp.copy()
    for edge in (np.s_[:, [0, -1]], np.s_[[0, -1]]):
        frame[window][edge] = _RED
    panels = [
        ("sharp frame; the box is enlarged beside and below", frame),
        (f"{baseline}: {_say(example.plain_scores)}", _enlarge(example.plain[window], ZOOM)),
        (f"VRT: {_say(example.restored_scores)}", _enlarge(example.restored[window], ZOOM)),
        ("sharp", _enlarge(example.sharp[window], ZOOM)),
    ]
    factor = math.ceil(_LEAST_WIDTH / frame.shape[1])
    panels = [(title, _enlarge(image, factor)) for title, image in panels]
    rows, columns = (max(image.shape[axis] for _, image in panels) for axis in (0, 1))
    sheet = np.full((2 * (rows + _HEAD), 2 * columns + _GAP, 3), 255, np.uint8)
    places = [(row * (rows + _HEAD), column * (columns + _GAP)) for row in (0, 1) for column in (0, 1)]
    for (y, x), (_, image) in zip(places, panels, strict=True):
        sheet[y + _HEAD : y + _HEAD + image.shape[0], x : x + image.shape[1]] = image
    picture = video_package("PIL.Image").fromarray(sheet)
    pen = video_package("PIL.ImageDraw").Draw(picture)
    for (y, x), (title, _) in zip(places, panels, strict=True):
        pen.text((x + 4, y + 2), title, fill=(0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG")


def most_changed(plain: Image, restored: Image) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the part, 1/ZOOM of each side, where two images differ most in the mean."""
    height, width = (max(1, side // ZOOM) for side in plain.shape[:2])
    difference = torch.from_numpy(np.abs(plain.astype(np.float32) - restored.astype(np.float32)).mean(axis=2))
    means = F.avg_pool2d(difference[None, None], (height, width), stride=1)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return top, left, height, width


def _enlarge(image: Image, factor: int) -> Image:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _say(scores: tuple[float, float]) -> str:
    return f"PSNR {scores[0]:.2f} dB, SSIM {scores[1]:.4f} (of the whole frame)"
