"""Restoring the test clips, sharded over ranks, and measuring each frame once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import everyrank
from everyrank.apps.video_restoration.data.degradation import imresize
from everyrank.apps.video_restoration.data.images import to_array, write_png
from everyrank.apps.video_restoration.metrics import METRICS, frame_metrics, mean
from everyrank.apps.video_restoration.network.vrt import VRT
from everyrank.apps.video_restoration.picture import Example
from everyrank.apps.video_restoration.tiling import restore_clip

logger = logging.getLogger(__name__)


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


class ClipValidator(everyrank.DefaultValidator):
    """Restores clips part by part and measures each frame once; a rank takes a clip at a time.

    Args:
        criterion: The loss; its mean over the clips is recorded beside the metrics.
        device: Where to restore; by default the world's device.
        val: The resolved ``val`` section.
        scale: Enlargement.
        border: Pixels left out of the metrics at each side.
        interpolation: Whether the network makes one frame of several.
        images: Folder for pictures.
        further: Arguments of ``DefaultValidator``.

    Attributes:
        clips: The scores of each clip, in the order of the data, on all ranks; None before the first evaluation.
        baseline: What "plain" is: "bicubic" or "input".
        example: On rank 0: one frame, if one was restored there.
    """

    def __init__(
        self,
        criterion: Any,
        device: str | torch.device | None = None,
        *,
        val: Mapping[str, Any],
        scale: int,
        border: int,
        interpolation: bool,
        images: str,
        **further: Any,
    ) -> None:
        super().__init__(criterion, device, **further)
        self._val, self._scale, self._border, self._images = val, scale, border, Path(images)
        self._interpolation, self.apply_model = interpolation, self.restore
        self.baseline = "bicubic" if scale > 1 else "input"
        self.clips: list[ClipScores] | None = None
        self.example: Example | None = None

    def evaluate(
        self, model: Any, loader: Any, between_batches: Callable[[], None] | None = None
    ) -> everyrank.EvaluationResult:
        """Restore and measure the clips of ``loader``. Collective."""
        mine: list[tuple[int, ClipScores, float]] = []
        self.example = None
        for number, output, clip in self.outputs(model, loader):
            if loader.batch_sampler.share(number).num_local and (scores := self._measure(output, clip)) is not None:
                loss = float(self.criterion(output.unsqueeze(0), {"H": self._wanted(clip)[1].unsqueeze(0)}))
                mine.append((number * self.world.world_size + self.world.rank, scores, loss))
            if between_batches is not None:
                between_batches()
        parts = sorted((part for parts in everyrank.gather_objects(mine) for part in parts), key=lambda part: part[0])
        merged: dict[str, ClipScores] = {}
        for _, scores, _ in parts:
            merged.setdefault(scores.clip, ClipScores(scores.clip)).add(scores.restored, scores.plain)
        self.clips = list(merged.values())
        losses = [loss for _, _, loss in parts]
        std = mean([(loss - mean(losses)) ** 2 for loss in losses]) ** 0.5
        self.result = everyrank.EvaluationResult(
            loss=mean(losses), loss_std=std, num_samples=len(losses), metrics=self.summary()
        )
        return self.result

    def restore(self, model: Any, clip: SimpleNamespace) -> Tensor:
        """Return a clip, restored part by part, on the CPU."""
        device, least = next(model.parameters()).device, smallest_side(model)
        with torch.autocast(device.type, enabled=False):
            return restore_clip(lambda part: model(part.to(device)), clip.L, self._val, scale=self._scale, least=least)

    def report(self, result: everyrank.EvaluationResult | None = None) -> str:
        """Return the table, and log it on rank 0."""
        if self.world.is_main and self.clips:
            logger.info("iteration %d: validation\n%s", self.step, self.table())
        return self.table() if self.clips else ""

    def _wanted(self, clip: SimpleNamespace) -> tuple[list[int], Any]:
        """Return the numbers of the frames that are restored, and how they should be or None."""
        frames, sharp = clip.frames, clip.H
        if self._interpolation or not self._val["center_frame_only"]:
            return frames, sharp
        middle = slice(len(frames) // 2, len(frames) // 2 + 1)
        return frames[middle], sharp[middle] if sharp is not None else None

    def _measure(self, restored: Tensor, clip: SimpleNamespace) -> ClipScores | None:
        frames, sharp = self._wanted(clip)
        if self._val["save_img"]:
            for frame, image in zip(frames, restored, strict=True):
                write_png(self._images / str(self.step) / clip.clip / f"{frame:08d}.png", to_array(image))
        if sharp is None:
            return None
        plain = plain_restoration(clip.L, self._scale, self._val, interpolation=self._interpolation)
        scores = ClipScores(clip.clip)
        scores.add(frame_metrics(restored, sharp, self._border), frame_metrics(plain, sharp, self._border))
        if self.example is None:
            middle = sharp.shape[0] // 2
            self.example = Example(
                plain=to_array(plain[middle]),
                restored=to_array(restored[middle]),
                sharp=to_array(sharp[middle]),
                plain_scores=(scores.plain["psnr"][middle], scores.plain["ssim"][middle]),
                restored_scores=(scores.restored["psnr"][middle], scores.restored["ssim"][middle]),
            )
        return scores

    def summary(self) -> dict[str, float]:
        """Return the mean over clips of their means, for the network and, as ``<baseline>_<metric>``, without it."""
        result: dict[str, float] = {}
        clips = self.clips or []
        for name in METRICS if clips else ():
            result[name] = mean([mean(clip.restored[name]) for clip in clips])
            result[f"{self.baseline}_{name}"] = mean([mean(clip.plain[name]) for clip in clips])
        return result

    def table(self) -> str:
        """Return the scores of each clip and their mean, network next to baseline, as text."""
        clips = self.clips or []
        width = max([4, *(len(clip.clip) for clip in clips)])
        names = ("PSNR", "SSIM", "PSNR-Y", "SSIM-Y")
        head = "  ".join(f"{name + ' ' + what:>15}" for name in names for what in ("VRT", self.baseline))
        lines = [f"{'clip':<{width}}  {head}"]
        summary = self.summary()
        rows = [(c.clip, [v for m in METRICS for v in (mean(c.restored[m]), mean(c.plain[m]))]) for c in clips]
        rows.append(("mean", [summary[k] for m in METRICS for k in (m, f"{self.baseline}_{m}")]))
        for name, values in rows:
            digits = [f"{value:>15.{4 if i % 4 >= 2 else 2}f}" for i, value in enumerate(values)]
            lines.append(f"{name:<{width}}  {'  '.join(digits)}")
        return "\n".join(lines)


class ClipTester(ClipValidator, everyrank.DefaultTester):
    """The same after the training."""

    name = "Test"


def smallest_side(network: VRT) -> int:
    """Return the smallest height and width that ``network`` takes."""
    least = 8 * max(network.window[1:])
    return max(least, 40) if network.pa_frames else least


def plain_restoration(low: Tensor, scale: int, val: Mapping[str, Any], *, interpolation: bool) -> Tensor:
    """Return what one has without a network: bicubic enlargement, the mean of the middle frames, or the input."""
    frames = low[:, :3]
    if interpolation:
        middle = frames.shape[0] // 2
        return frames[middle - 1 : middle + 1].mean(0, keepdim=True)
    if val["center_frame_only"]:
        frames = frames[frames.shape[0] // 2 : frames.shape[0] // 2 + 1]
    return imresize(frames, scale) if scale > 1 else frames
