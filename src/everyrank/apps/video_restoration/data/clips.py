"""Clips of sharp and low-quality frames: which there are, whether they pair, and cutting patches of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everyrank import DataError, did_you_mean
from everyrank.apps.video_restoration.data.degradation import degrade
from everyrank.apps.video_restoration.data.images import to_tensor
from everyrank.apps.video_restoration.data.sources import CachedSource, FrameSource, open_source

VAL_PARTITIONS = {
    "REDS4": ("000", "011", "015", "020"),
    "official": tuple(f"{i:03d}" for i in range(240, 270)),
}


@dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        name: Its name in the source.
        first: Its first usable frame.
        num_frames: Number of usable frames.
    """

    name: str
    first: int
    num_frames: int


@dataclass(frozen=True)
class Patch:
    """A rectangle of the sharp frame, in pixels; the scale divides all four numbers."""

    top: int
    left: int
    height: int
    width: int


class ClipReader:
    """Reads pairs of sharp and low-quality frames, making the latter where they are not stored.

    Args:
        options: A resolved data section.

    Raises:
        DataError: Data are missing, do not pair, or a list names what is not there.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.scale: int = options["scale"]
        self.blur_sigma: float = options["blur_sigma"]
        kind = options["degradation"] or ("bicubic" if self.scale > 1 else "none")
        self.noisy = kind == "noise"
        self.kind = "none" if self.noisy else kind
        backend = options["io_backend"]
        backend = backend.get("type") if isinstance(backend, dict) else backend
        listed = _read_list(options["meta_info_file"])

        def source(root: str | None) -> FrameSource | None:
            if not root:
                return None
            opened = open_source(root, backend, list(listed) if listed else None)
            return CachedSource(opened) if options["cache_data"] else opened

        self.gt, self.lq = source(options["dataroot_gt"]), source(options["dataroot_lq"])
        main = self.gt if self.gt is not None else self.lq
        assert main is not None  # the loader of options made sure of one
        self.clips = self._choose(main.clips(), listed, options)
        if self.gt is not None and self.lq is not None:
            self._check_pairs(options)

    def _choose(
        self, found: Mapping[str, int], listed: Mapping[str, int], options: Mapping[str, Any]
    ) -> tuple[Clip, ...]:
        for name in listed:
            if name not in found:
                raise DataError(
                    f"meta_info_file {options['meta_info_file']} lists the clip {name!r}, which is not in "
                    f"{options['dataroot_gt']}.{did_you_mean(name, found)} Mend the list or the data folder"
                )
            if listed[name] not in (0, found[name]):
                raise DataError(
                    f"meta_info_file {options['meta_info_file']} says the clip {name!r} has {listed[name]} frames; "
                    f"found {found[name]}. Complete the clip or correct the list"
                )
        names = list(listed or found)
        if options["phase"] == "train" and options["val_partition"]:
            held_out = options["val_partition"]
            held_out = set(VAL_PARTITIONS.get(held_out, (held_out,)) if isinstance(held_out, str) else held_out)
            names = [name for name in names if name not in held_out]
        first, stop = options["frame_range"] or (0, None)
        clips = []
        for name in names:
            end = min(found[name], stop) if stop is not None else found[name]
            if end <= first:
                raise DataError(
                    f"frame_range {options['frame_range']} leaves nothing of the clip {name!r}, which has "
                    f"{found[name]} frames: set a range inside it"
                )
            clips.append(Clip(name, first, end - first))
        if not clips:
            raise DataError(f"val_partition {options['val_partition']!r} leaves no clip to train on: hold fewer out")
        return tuple(clips)

    def _check_pairs(self, options: Mapping[str, Any]) -> None:
        assert self.gt is not None
        assert self.lq is not None
        sharp, low = self.gt.clips(), self.lq.clips()
        problems = []
        for clip in self.clips:
            if clip.name not in low and len(sharp) == len(low) == 1:
                low = {clip.name: next(iter(low.values()))}  # two single videos may have different names
            if clip.name not in low:
                problems.append(f"{clip.name}: {sharp[clip.name]} sharp frames and no low-quality clip")
            elif sharp[clip.name] != low[clip.name]:
                problems.append(f"{clip.name}: {sharp[clip.name]} sharp and {low[clip.name]} low-quality frames")
        if problems:
            raise DataError(
                f"the frames of {options['dataroot_gt']} and {options['dataroot_lq']} do not pair; make their numbers "
                "equal:\n  - " + "\n  - ".join(problems[:20])
            )

    def _read(self, source: FrameSource, clip: Clip, frames: Sequence[int]) -> np.ndarray:
        name = clip.name if source is not self.lq or self.gt is None else self._low_name(clip.name)
        return np.stack([source.read(name, clip.first + frame) for frame in frames])

    def _low_name(self, name: str) -> str:
        assert self.lq is not None
        low = self.lq.clips()
        return name if name in low else next(iter(low))

    def size(self, clip: Clip) -> tuple[int, int]:
        """Return height and width of the sharp frames of a clip, cropped to multiples of the scale."""
        source, factor = (self.gt, 1) if self.gt is not None else (self.lq, self.scale)
        assert source is not None
        height, width = source.read(clip.name, clip.first).shape[:2]
        height, width = height * factor, width * factor
        return height - height % self.scale, width - width % self.scale

    def read(
        self, clip: Clip, frames: Sequence[int], patch: Patch | None = None, sharp: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return low-quality and sharp frames.

        Args:
            clip: The clip.
            frames: Places of the frames, counted from the clip's first usable one.
            patch: Rectangle of the sharp frame; None for all of it.
            sharp: Other places for the sharp frames, as frame interpolation has.

        Returns:
            Low-quality (T, 3, h, w) and sharp frames (T', 3, h * scale, w * scale) in [0, 1]; the latter None without
            sharp data.

        Raises:
            DataError: Sizes of the pair do not fit the scale.
        """
        height, width = self.size(clip)
        area = patch or Patch(0, 0, height, width)
        if area.height > height or area.width > width:
            raise DataError(
                f"gt_size is {area.height} and frames of the clip {clip.name!r} are {height} x {width}: "
                f"set gt_size to at most {min(height, width) // self.scale * self.scale}"
            )
        target = None
        if self.gt is not None:
            target = to_tensor(_cut(self._read(self.gt, clip, frames if sharp is None else sharp), area))
        if self.lq is None:
            assert self.gt is not None
            return self._made(clip, frames, area, (height, width)), target
        low = self._read(self.lq, clip, frames)
        wanted = (height // self.scale, width // self.scale)
        if self.gt is not None and (low.shape[1] < wanted[0] or low.shape[2] < wanted[1]):
            raise DataError(
                f"frames of the clip {clip.name!r} are {height} x {width} sharp and {low.shape[1]} x {low.shape[2]} of "
                f"low quality; scale {self.scale} needs {wanted[0]} x {wanted[1]}: mend the scale or the data"
            )
        s = self.scale
        return to_tensor(_cut(low, Patch(area.top // s, area.left // s, area.height // s, area.width // s))), target

    def _made(self, clip: Clip, frames: Sequence[int], area: Patch, size: tuple[int, int]) -> Tensor:
        """Degrade the patch with a margin, so that it is what a patch of the degraded frame would be."""
        assert self.gt is not None
        s = self.scale
        margin = 4 * s + (s * (int(3 * self.blur_sigma) // s + 1) if self.kind == "blur" else 0)
        top, left = max(area.top - margin, 0), max(area.left - margin, 0)
        bottom = min(area.top + area.height + margin, size[0])
        right = min(area.left + area.width + margin, size[1])
        wide = to_tensor(_cut(self._read(self.gt, clip, frames), Patch(top, left, bottom - top, right - left)))
        low = degrade(wide, self.kind, scale=s, blur_sigma=self.blur_sigma)
        y, x = (area.top - top) // s, (area.left - left) // s
        return low[..., y : y + area.height // s, x : x + area.width // s].contiguous()


def add_noise(low: Tensor, sigma: float, generator: torch.Generator, *, with_map: bool) -> Tensor:
    """Add Gaussian noise of ``sigma`` (of 1) to (T, C, H, W) and, ``with_map``, a channel that tells the level."""
    noisy = low + sigma * torch.randn(low.shape, generator=generator)
    if not with_map:
        return noisy
    return torch.cat((noisy, torch.full_like(low[:, :1], sigma)), dim=1)


def _cut(frames: np.ndarray, area: Patch) -> np.ndarray:
    return frames[:, area.top : area.top + area.height, area.left : area.left + area.width]


def _read_list(path: str | None) -> dict[str, int]:
    """Read a list of clips: name, number of frames (then shape and first frame, which the data tell themselves)."""
    if not path:
        return {}
    if not Path(path).exists():
        raise DataError(f"meta_info_file {path} does not exist: set the list's path, or leave it out to use all clips")
    listed = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        fields = line.split()
        if fields:
            if len(fields) > 1 and not fields[1].isdigit():
                raise DataError(f"{path}: line {number}: found {line!r}; give a clip's name and its number of frames")
            listed[fields[0]] = int(fields[1]) if len(fields) > 1 else 0
    return listed
