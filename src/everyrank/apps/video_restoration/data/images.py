"""Images as arrays and tensors: PNG and JPEG files, 8-bit rounding."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from everyrank import DataError
from everyrank.apps.video_restoration.extras import video_package


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Return an encoded image as RGB, uint8 (H, W, 3); ``name`` is for the message of a damaged one."""
    image = video_package("PIL.Image")
    try:
        with image.open(io.BytesIO(content)) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"the image {name} cannot be decoded ({error}): replace it or take its clip out") from error


def encode_png(frame: np.ndarray) -> bytes:
    """Return RGB, uint8 (H, W, 3), as PNG."""
    buffer = io.BytesIO()
    video_package("PIL.Image").fromarray(frame).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def write_png(path: Path, frame: np.ndarray) -> None:
    """Write RGB, uint8 (H, W, 3), as a PNG file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(frame))


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) to float32 (T, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float().div_(255.0)


def to_array(frame: Tensor) -> np.ndarray:
    """Frame (3, H, W) in [0, 1] to RGB, uint8 (H, W, 3)."""
    rounded = frame.detach().float().clamp(0, 1).mul(255.0).round().to(torch.uint8)  # as the field rounds
    return rounded.permute(1, 2, 0).cpu().numpy()
