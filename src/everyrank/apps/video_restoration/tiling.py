"""Restoring clips larger than memory: cut in time and space with overlap, restored part by part, blended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Restore = Callable[[Tensor], Tensor]
MULTIPLE = 8


def restore_clip(network: Restore, clip: Tensor, val: Mapping[str, Any], *, scale: int, least: int) -> Tensor:
    """Restore a clip as the ``val`` section says.

    Args:
        network: Maps (1, T, C, h, w) to (1, T', 3, scale * h, scale * w).
        clip: (T, C, h, w) in [0, 1].
        val: The resolved ``val`` section.
        scale: Enlargement.
        least: Smallest height and width the network takes.

    Returns:
        (T', 3, scale * h, scale * w) on the CPU; only the middle frame if ``center_frame_only``.
    """
    frames = clip.shape[0]
    if val["pad_seq"]:
        clip = torch.cat((clip, clip[-1:]))
    padded = clip.shape[0]
    if val["flip_seq"]:
        clip = torch.cat((clip, clip.flip(0)))
    restored = _in_time(network, clip, val, scale, least)
    if restored.shape[0] == clip.shape[0]:  # not so for frame interpolation, which makes one frame
        if val["flip_seq"]:
            restored = 0.5 * (restored[:padded] + restored[padded:].flip(0))
        restored = restored[:frames]
        if val["center_frame_only"]:
            restored = restored[frames // 2 : frames // 2 + 1]
    return restored


def starts(length: int, part: int, overlap: int) -> list[int]:
    """Return where parts begin so that they cover ``length``, neighbours sharing at least ``overlap``.

    Example:
        >>> starts(10, 4, 1)
        [0, 3, 6]
    """
    if part <= 0 or part >= length:
        return [0]
    step = max(part - min(overlap, part - 1), 1)
    return sorted({*range(0, length - part, step), length - part})


def ramp(length: int, overlap: int, *, first: bool, last: bool) -> Tensor:
    """Weights of a part: rising over ``overlap`` at its start, falling at its end, flat at the clip's own ends."""
    weight = torch.ones(length)
    overlap = min(overlap, length)
    if overlap > 0:
        slope = torch.arange(1, overlap + 1) / (overlap + 1)
        if not first:
            weight[:overlap] = torch.minimum(weight[:overlap], slope)
        if not last:
            weight[length - overlap :] = torch.minimum(weight[length - overlap :], slope.flip(0))
    return weight


def _in_time(network: Restore, clip: Tensor, val: Mapping[str, Any], scale: int, least: int) -> Tensor:
    total, part, overlap = clip.shape[0], val["num_frame_testing"], val["num_frame_overlapping"]
    begins = starts(total, part, overlap)
    if len(begins) == 1:
        return _in_space(network, clip, val, scale, least)
    height, width = clip.shape[-2] * scale, clip.shape[-1] * scale
    sums, weights = torch.zeros(total, 3, height, width), torch.zeros(total, 1, 1, 1)
    for begin in begins:
        weight = ramp(part, overlap, first=begin == 0, last=begin == begins[-1]).view(-1, 1, 1, 1)
        sums[begin : begin + part] += weight * _in_space(network, clip[begin : begin + part], val, scale, least)
        weights[begin : begin + part] += weight
    return sums / weights


def _in_space(network: Restore, clip: Tensor, val: Mapping[str, Any], scale: int, least: int) -> Tensor:
    height, width = clip.shape[-2:]
    size = val["size_patch_testing"]
    if size <= 0 or (size >= height and size >= width):
        return _padded(network, clip, scale, least)
    tall, wide = min(size, height), min(size, width)
    overlap = val["size_patch_overlapping"]
    rows, columns = starts(height, tall, overlap), starts(width, wide, overlap)
    sums = weights = torch.zeros(0)
    for top in rows:
        down = ramp(tall * scale, overlap * scale, first=top == 0, last=top == rows[-1])
        for left in columns:
            across = ramp(wide * scale, overlap * scale, first=left == 0, last=left == columns[-1])
            weight = down.unsqueeze(1) * across
            part = _padded(network, clip[..., top : top + tall, left : left + wide], scale, least)
            if not sums.numel():
                sums = torch.zeros(part.shape[0], part.shape[1], height * scale, width * scale)
                weights = torch.zeros(height * scale, width * scale)
            area = (slice(top * scale, (top + tall) * scale), slice(left * scale, (left + wide) * scale))
            sums[..., area[0], area[1]] += weight * part
            weights[area] += weight
    return sums / weights


def _padded(network: Restore, clip: Tensor, scale: int, least: int) -> Tensor:
    """Restore a part after mirroring it up to a size the network takes."""
    height, width = clip.shape[-2:]
    tall, wide = (max(-(-side // MULTIPLE) * MULTIPLE, least) for side in (height, width))
    mirrored = clip[..., _mirror(height, tall), :][..., _mirror(width, wide)]
    return network(mirrored.unsqueeze(0)).squeeze(0)[..., : height * scale, : width * scale].float().cpu()


def _mirror(length: int, wanted: int) -> Tensor:
    """Indices 0 .. length-1, then back and forth, ``wanted`` in all."""
    index = torch.arange(wanted) % (2 * length)
    return torch.where(index < length, index, 2 * length - 1 - index)
