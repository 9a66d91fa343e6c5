"""Clips and small option files for the tests of video restoration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def _compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Activation checkpointing imports torch's compiler, which makes a folder for its cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    yield
    patch.undo()


def clip_frames(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth pattern that moves, uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6.28, 3)
    t, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.3 * (x + 1.5 * t) + p) * np.cos(0.23 * (y - t) + p) for p in phase]
    noise = rng.uniform(-0.03, 0.03, (num_frames, height, width, 3))
    return np.round(255 * np.clip(0.5 + 0.4 * np.stack(waves, -1) + noise, 0, 1)).astype(np.uint8)


def write_clips(root: Path, clips: dict[str, np.ndarray], name: str = "{:08d}.png") -> Path:
    """Write each clip as a folder of PNG files."""
    from everyrank.apps.video_restoration.data.images import write_png

    for clip, frames in clips.items():
        for i, frame in enumerate(frames):
            write_png(root / clip / name.format(i), frame)
    return root


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 5 frames, 48 x 56."""
    root = tmp_path_factory.mktemp("clips")
    return write_clips(root, {f"{i:03d}": clip_frames(5, 48, 56, seed=i) for i in range(3)})


TINY_NET = {
    "img_size": [2, 40, 40],
    "window_size": [2, 4, 4],
    "depths": [2] * 8,
    "indep_reconsts": [7],
    "embed_dims": [8] * 8,
    "num_heads": [2] * 8,
    "deformable_groups": 2,
    "drop_path_rate": 0.0,
}


def tiny_options(clips: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run of seconds: a tiny VRT removes blur; ``changes`` are by section."""
    options: dict[str, Any] = {
        "task": "tiny",
        "gpu_ids": "auto",
        "scale": 1,
        "path": {"root": str(root)},
        "datasets": {
            "train": {
                "dataset_type": "VideoRecurrentTrainDataset",
                "dataroot_gt": str(clips),
                "degradation": "blur",
                "val_partition": ["002"],
                "num_frame": 2,
                "gt_size": 40,
                "dataloader_batch_size": 3,
            },
            "test": {
                "dataset_type": "VideoRecurrentTestDataset",
                "dataroot_gt": str(clips),
                "degradation": "blur",
                "num_frame": 3,
            },
        },
        "netG": dict(TINY_NET),
        "train": {
            "G_optimizer_lr": 1e-3,
            "G_optimizer_clipgrad": 1.0,
            "E_decay": 0.5,
            "fix_iter": 2,
            "fix_lr_mul": 0.5,
            "fix_keys": ["spynet", "deform"],
            "total_iter": 4,
            "G_scheduler_periods": [4],
            "checkpoint_test": 0,
            "checkpoint_save": 2,
            "checkpoint_print": 1,
            "manual_seed": 3,
        },
        "val": {"num_frame_testing": 2, "num_frame_overlapping": 1},
        "trainer": {"training": {"plots": False, "tracking": {"tensorboard": False}}},
    }
    for section, values in changes.items():
        if isinstance(values, dict) and isinstance(options.get(section), dict):
            options[section] = {**options[section], **values}
        else:
            options[section] = values
    return options


@pytest.fixture
def write_options(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write options to a file with a comment in it."""

    def write(options: dict[str, Any], name: str = "options.json") -> Path:
        path = tmp_path / name
        path.write_text("// a run of seconds\n" + json.dumps(options, indent=2))
        return path

    return write
