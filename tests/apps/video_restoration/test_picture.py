"""The picture shows each pixel in its own colour, and enlarges the part where the network changed most."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from everyrank.apps.video_restoration.picture import ZOOM, Example, most_changed, write_picture


def test_a_picture_holds_the_frame_and_its_most_changed_part(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    plain, sharp = (rng.integers(0, 256, (40, 64, 3), dtype=np.uint8) for _ in range(2))
    restored = plain.copy()
    restored[13:23, 30:46] ^= 128
    restored[0, 0] ^= 255
    window = most_changed(plain, restored)
    assert window == (13, 30, 40 // ZOOM, 64 // ZOOM)
    path = tmp_path / "images" / "picture.png"
    write_picture(path, Example(plain, restored, sharp, (20.5, 0.61), (21.5, 0.72)), "bicubic")
    with image.open(path) as written:
        assert written.mode == "RGB"
        shown = np.asarray(written)
    times = 6  # 64 pixels are too narrow for the titles
    assert shown.shape == (2 * (16 + 40 * times), 2 * 64 * times + 4, 3)
    top, bottom, left, right = 16, 40 * times + 32, 0, 64 * times + 4
    for title in (shown[:top], shown[bottom - 16 : bottom]):
        assert (title[:, right - 4 : right] == 255).all(), "a title runs into the next panel"
    frame = shown[top : top + 40 * times : times, left : left + 64 * times : times]
    np.testing.assert_array_equal(np.delete(frame, np.s_[13:23], axis=0), np.delete(sharp, np.s_[13:23], axis=0))
    np.testing.assert_array_equal(frame[14:22, 31:45], sharp[14:22, 31:45])
    assert (frame[13, 30:46] == (255, 0, 0)).all(), "a box around what is enlarged"
    for y, x, panel in ((top, right, plain), (bottom, left, restored), (bottom, right, sharp)):
        enlarged = shown[y : y + 40 * times, x : x + 64 * times]
        np.testing.assert_array_equal(enlarged[1 :: ZOOM * times, 2 :: ZOOM * times], panel[13:23, 30:46])


def test_a_large_frame_is_shown_pixel_by_pixel(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    black = np.zeros((40, 400, 3), np.uint8)
    write_picture(tmp_path / "picture.png", Example(black, black, black, (20.5, 0.61), (21.5, 0.72)), "bicubic")
    with image.open(tmp_path / "picture.png") as written:
        assert written.size == (2 * 400 + 4, 2 * (16 + 40))


def test_small_and_equal_images_have_a_part_too() -> None:
    black = np.zeros((3, 2, 3), np.uint8)
    assert most_changed(black, black) == (0, 0, 1, 1)
