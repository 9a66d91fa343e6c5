"""Samples of clips: patches for training, whole clips for testing.

All random choices of a training sample come from the generator that is handed over with its index, so they are the same
on whichever rank and in whichever loader process the sample is made.
"""

from __future__ import annotations

import bisect
import itertools
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from everyrank import DataError
from everyrank.apps.video_restoration.data.clips import Clip, ClipReader, Patch, add_noise
from everyrank.apps.video_restoration.data.jitter import ColorJitter

SEPTUPLET = 7
INTERPOLATION_INPUT, INTERPOLATION_TARGET = (0, 2, 4, 6), (3,)


def _draw(generator: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (1,), generator=generator))


class TrainDataset(Dataset):
    """Training samples ``{"L": (T, C, h, w), "H": (T', 3, H, W), "key": clip/frame}``.

    Args:
        options: The resolved ``datasets.train`` section.
        noise_map: Whether "L" has the map of noise levels as its last channel (non-blind denoising).

    Raises:
        DataError: Data are missing or too few.
    """

    def __init__(self, options: Mapping[str, Any], *, noise_map: bool = False) -> None:
        self.options = options
        self.reader = ClipReader(options)
        self.noise_map = noise_map
        self.noisy = noise_map or self.reader.noisy or "Nonblind" in options["dataset_type"]
        self.vimeo = "Vimeo" in options["dataset_type"]
        self.interpolation = "VFI" in options["dataset_type"]
        self.num_frame = SEPTUPLET if self.vimeo else options["num_frame"]
        self.ends = list(itertools.accumulate(self._num_starts(clip) for clip in self.reader.clips))

    def _num_starts(self, clip: Clip) -> int:
        starts = clip.num_frames - (self.num_frame - 1) * min(self.options["interval_list"])
        if starts < 1:
            raise DataError(
                f"the clip {clip.name!r} has {clip.num_frames} usable frames and a sample takes {self.num_frame} with "
                f"interval {min(self.options['interval_list'])}: set num_frame lower or leave the clip out"
            )
        if self.vimeo:
            return 1
        return self.options["samples_per_clip"] or starts

    def __len__(self) -> int:
        """Number of samples of an epoch."""
        return self.ends[-1]

    def _frames(self, clip: Clip, place: int, generator: torch.Generator) -> list[int]:
        if self.vimeo:
            return list(range(SEPTUPLET))
        reach = clip.num_frames - 1
        if self.options["samples_per_clip"]:
            smallest = min(self.options["interval_list"])
            place = _draw(generator, clip.num_frames - (self.num_frame - 1) * smallest)
        fitting = [i for i in self.options["interval_list"] if place + (self.num_frame - 1) * i <= reach]
        interval = fitting[_draw(generator, len(fitting))]
        return list(range(place, place + self.num_frame * interval, interval))

    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return sample ``index``; without a generator it is drawn from its number alone."""
        generator = generator or torch.Generator().manual_seed(index)
        number = bisect.bisect_right(self.ends, index)
        clip = self.reader.clips[number]
        frames = self._frames(clip, index - (self.ends[number - 1] if number else 0), generator)
        if self.options["random_reverse"] and _draw(generator, 2):
            frames.reverse()
        height, width = self.reader.size(clip)
        size, scale = self.options["gt_size"], self.options["scale"]
        top = _draw(generator, max((height - size) // scale, 0) + 1) * scale
        left = _draw(generator, max((width - size) // scale, 0) + 1) * scale
        inputs = [frames[i] for i in INTERPOLATION_INPUT] if self.interpolation else frames
        targets = [frames[i] for i in INTERPOLATION_TARGET] if self.interpolation else frames
        low, sharp = self.reader.read(clip, inputs, Patch(top, left, size, size), targets)
        assert sharp is not None
        low, sharp = self._augment(low, sharp, generator)
        if self.options["color_jitter"]:
            jitter = ColorJitter.draw(generator)
            low, sharp = jitter(low), jitter(sharp)
        if self.vimeo and not self.interpolation:
            low, sharp = _extend(low, sharp, self.options)
        if self.noisy:
            span = self.options["sigma_max"] - self.options["sigma_min"]
            sigma = self.options["sigma_min"] + span * float(torch.rand(1, generator=generator))
            low = add_noise(low, sigma / 255.0, generator, with_map=self.noise_map)
        return {"L": low, "H": sharp, "key": f"{clip.name}/{clip.first + frames[0]}"}

    def _augment(self, low: Tensor, sharp: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        mirror = self.options["use_hflip"] and _draw(generator, 2)
        flip = self.options["use_rot"] and _draw(generator, 2)
        turn = self.options["use_rot"] and _draw(generator, 2)

        def change(x: Tensor) -> Tensor:
            x = x.flip(-1) if mirror else x
            x = x.flip(-2) if flip else x
            return (x.transpose(-1, -2) if turn else x).contiguous()

        return change(low), change(sharp)


def _extend(low: Tensor, sharp: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Make a sequence of 7 frames longer, as windows of an even number of frames like it."""
    if options.get("mirror_sequence"):
        return torch.cat((low, low.flip(0))), torch.cat((sharp, sharp.flip(0)))
    if options.get("pad_sequence"):
        return torch.cat((low, low[-1:])), torch.cat((sharp, sharp[-1:]))
    return low, sharp


class TestDataset(Dataset):
    """Whole clips ``{"L": (T, C, h, w), "H": (T', 3, H, W) or None, "clip": name, "frames": numbers of "H"}``.

    Args:
        options: The resolved ``datasets.test`` section.
        noise_map: Whether "L" has the map of noise levels as its last channel.
        interpolation: Whether the network makes one frame of several: then each sequence of seven frames, begun at
            every second frame, is a sample.
    """

    __test__ = False  # not a test case, whatever its name

    def __init__(self, options: Mapping[str, Any], *, noise_map: bool = False, interpolation: bool = False) -> None:
        self.options = options
        self.reader = ClipReader(options)
        self.noise_map = noise_map
        self.interpolation = interpolation
        self.samples: list[tuple[Clip, int]] = []
        for clip in self.reader.clips:
            if not interpolation:
                self.samples.append((clip, 0))
                continue
            if clip.num_frames < SEPTUPLET:
                raise DataError(f"the clip {clip.name!r} has {clip.num_frames} frames; interpolation takes {SEPTUPLET}")
            self.samples += [(clip, start) for start in range(0, clip.num_frames - SEPTUPLET + 1, 2)]

    def __len__(self) -> int:
        """Number of clips, or of sequences."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a clip; its noise is drawn from its name and ``noise_seed``."""
        clip, start = self.samples[index]
        if self.interpolation:
            inputs = [start + i for i in INTERPOLATION_INPUT]
            targets = [start + i for i in INTERPOLATION_TARGET]
        else:
            limit = self.options["num_frame"]
            inputs = targets = list(range(clip.num_frames if limit < 1 else min(limit, clip.num_frames)))
        low, sharp = self.reader.read(clip, inputs, sharp=targets)
        sigma = self.options["sigma"]
        if sigma is not None or self.noise_map:
            seed = zlib.crc32(f"{self.options['noise_seed']} {clip.name}".encode())
            generator = torch.Generator().manual_seed(seed)
            low = add_noise(low, (sigma or 0.0) / 255.0, generator, with_map=self.noise_map)
        return {"L": low, "H": sharp, "clip": clip.name, "frames": [clip.first + i for i in targets]}
