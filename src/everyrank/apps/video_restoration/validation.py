"""Restoring the test clips, sharded over ranks, and measuring each frame once."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everyrank.apps.video_restoration.data.datasets import TestDataset
from everyrank.apps.video_restoration.data.degradation import imresize
from everyrank.apps.video_restoration.data.images import to_array, write_png
from everyrank.apps.video_restoration.metrics import METRICS, frame_metrics, mean
from everyrank.apps.video_restoration.network.vrt import VRT
from everyrank.apps.video_restoration.tiling import restore_clip
from everyrank.runtime.collectives import gather_objects
from everyrank.runtime.world import World


@dataclass
class ClipScores:
    """Metrics of one clip's frames, for the restored clip and for the plain one.

    Attributes:
        clip: Its name.
        restored: For each metric, its value of each frame.
        plain: The same for what one has without the network: bicubic enlargement, or the input itself.
    """

    clip: str
    restored: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METRICS})
    plain: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METRICS})

    def add(self, restored: Mapping[str, list[float]], plain: Mapping[str, list[float]]) -> None:
        """Append the metrics of more frames."""
        for name in METRICS:
            self.restored[name] += restored[name]
            self.plain[name] += plain[name]


@dataclass
class Validation:
    """What a validation found, the same on all ranks.

    Attributes:
        clips: The scores of each clip, in the order of the data.
        baseline: What "plain" is: "bicubic" or "input".
        example: On rank 0: the input, plain, restored and sharp image of one frame, if one was restored there.
    """

    clips: list[ClipScores]
    baseline: str
    example: dict[str, np.ndarray] | None = None

    def summary(self) -> dict[str, float]:
        """Return the mean over clips of their means, for the network and, as ``<baseline>_<metric>``, without it."""
        result: dict[str, float] = {}
        for name in METRICS if self.clips else ():
            result[name] = mean([mean(clip.restored[name]) for clip in self.clips])
            result[f"{self.baseline}_{name}"] = mean([mean(clip.plain[name]) for clip in self.clips])
        return result

    def table(self) -> str:
        """Return the scores of each clip and their mean, network next to baseline, as text."""
        width = max([4, *(len(clip.clip) for clip in self.clips)])
        names = ("PSNR", "SSIM", "PSNR-Y", "SSIM-Y")
        head = "  ".join(f"{name + ' ' + what:>15}" for name in names for what in ("VRT", self.baseline))
        lines = [f"{'clip':<{width}}  {head}"]
        summary = self.summary()
        rows = [(c.clip, [v for m in METRICS for v in (mean(c.restored[m]), mean(c.plain[m]))]) for c in self.clips]
        rows.append(("mean", [summary[k] for m in METRICS for k in (m, f"{self.baseline}_{m}")]))
        for name, values in rows:
            digits = [f"{value:>15.{4 if i % 4 >= 2 else 2}f}" for i, value in enumerate(values)]
            lines.append(f"{name:<{width}}  {'  '.join(digits)}")
        return "\n".join(lines)


def validate(
    network: VRT, data: TestDataset, options: Mapping[str, Any], world: World, images: Path | None = None
) -> Validation:
    """Restore and measure the test clips. Collective: each rank takes every ``world.size``-th sample.

    Args:
        network: The network, on the rank's device.
        data: The clips.
        options: The resolved options of the run.
        world: The joined world.
        images: Folder for restored frames, or None.
    """
    val, scale, interpolation = options["val"], options["scale"], network.pa_frames == 0
    least = smallest_side(network)
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    found: dict[int, ClipScores] = {}
    example = None

    def restore(clip: Tensor) -> Tensor:
        with torch.no_grad():
            return network(clip.to(device))

    for number in range(world.rank, len(data), world.size):
        sample = data[number]
        restored = restore_clip(restore, sample["L"], val, scale=scale, least=least)
        frames = sample["frames"]
        sharp = sample["H"]
        if val["center_frame_only"] and not interpolation:
            frames = frames[len(frames) // 2 : len(frames) // 2 + 1]
            sharp = sharp[sharp.shape[0] // 2 : sharp.shape[0] // 2 + 1] if sharp is not None else None
        if images is not None:
            for frame, image in zip(frames, restored, strict=True):
                write_png(images / sample["clip"] / f"{frame:08d}.png", to_array(image))
        if sharp is None:
            continue
        plain = plain_restoration(sample["L"], scale, options, interpolation=interpolation)
        border = options["datasets"]["test"]["border"]
        scores = ClipScores(sample["clip"])
        scores.add(frame_metrics(restored, sharp, border), frame_metrics(plain, sharp, border))
        found[number] = scores
        if example is None:
            middle = sharp.shape[0] // 2
            low = sample["L"][min(middle, sample["L"].shape[0] - 1), :3]
            shown = {"input": low, "plain": plain[middle], "restored": restored[middle], "sharp": sharp[middle]}
            example = {name: to_array(image) for name, image in shown.items()}
    network.train(was_training)
    scores_by_number: dict[int, ClipScores] = {}
    for part in gather_objects(found):
        scores_by_number |= part
    clips: dict[str, ClipScores] = {}
    for _, scores in sorted(scores_by_number.items()):
        if scores.clip in clips:
            clips[scores.clip].add(scores.restored, scores.plain)
        else:
            clips[scores.clip] = copy.deepcopy(scores)
    return Validation(list(clips.values()), "bicubic" if scale > 1 else "input", example)


def smallest_side(network: VRT) -> int:
    """Return the smallest height and width that ``network`` takes."""
    least = 8 * max(network.window[1:])
    return max(least, 40) if network.pa_frames else least


def plain_restoration(low: Tensor, scale: int, options: Mapping[str, Any], *, interpolation: bool) -> Tensor:
    """Return what one has without a network: bicubic enlargement, the mean of the middle frames, or the input."""
    frames = low[:, :3]
    if interpolation:
        middle = frames.shape[0] // 2
        return frames[middle - 1 : middle + 1].mean(0, keepdim=True)
    if options["val"]["center_frame_only"]:
        frames = frames[frames.shape[0] // 2 : frames.shape[0] // 2 + 1]
    return imresize(frames, scale) if scale > 1 else frames


def write_side_by_side(path: Path, example: Mapping[str, np.ndarray], baseline: str) -> None:
    """Write a PNG with the baseline, the restored and the sharp image next to each other, each under its name."""
    from everyrank.apps.video_restoration.extras import video_package

    names = {"plain": baseline, "restored": "VRT", "sharp": "sharp"}
    gap, head = 4, 16
    height, width = example["sharp"].shape[:2]
    sheet = np.full((height + head, 3 * width + 2 * gap, 3), 255, np.uint8)
    for i, name in enumerate(names):
        sheet[head:, i * (width + gap) : i * (width + gap) + width] = example[name]
    image = video_package("PIL.Image").fromarray(sheet)
    pen = video_package("PIL.ImageDraw").Draw(image)
    for i, title in enumerate(names.values()):
        pen.text((i * (width + gap) + 4, 2), title, fill=(0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")
