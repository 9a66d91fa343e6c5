"""What VRT can be built from and fed with, said before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from everyrank import ConfigError, DataError, did_you_mean, schema
from everyrank.apps.video_restoration.options.keys import NetworkOptions

NUM_STAGES = 7
SMALLEST_SCALE = 8  # the fourth stage works on frames of 1/8 the height and width
FLOW_PYRAMID = 32  # five halvings


def complete_architecture(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all architecture keys of VRT: those given, and the defaults of ``NetworkOptions``.

    Raises:
        ConfigError: It names every unknown key and every contradiction.
    """
    defaults = {**schema.as_mapping(NetworkOptions()), "upscale": 4}
    cfg = {**defaults, **given}
    problems = [f"{key}: unknown key.{did_you_mean(key, defaults)}" for key in given if key not in defaults]
    depths, dims, heads = cfg["depths"], cfg["embed_dims"], cfg["num_heads"]
    if not len(depths) == len(dims) == len(heads):
        problems.append(
            f"depths, embed_dims and num_heads have {len(depths)}, {len(dims)} and {len(heads)} entries: "
            "give each stage one of each"
        )
    elif len(depths) < NUM_STAGES + 1:
        problems.append(f"depths has {len(depths)} entries: give the seven stages one each and at least one more after")
    else:
        problems += _check_stages(cfg)
    if len(cfg["window_size"]) != 3:
        problems.append(f"window_size is {cfg['window_size']}: give [frames, height, width]")
    if cfg["pa_frames"] not in (0, 2, 4, 6):
        problems.append(f"pa_frames is {cfg['pa_frames']}: it is 0 (no parallel warping), 2, 4 or 6")
    if cfg["upscale"] not in (1, 2, 3, 4, 8):
        problems.append(f"upscale is {cfg['upscale']}: it is 1, 2, 3, 4 or 8")
    if not cfg["pa_frames"] and cfg["upscale"] != 1:
        problems.append(f"pa_frames 0 interpolates frames, which needs upscale 1; found {cfg['upscale']}")
    if cfg["nonblind_denoising"] and not cfg["pa_frames"]:
        problems.append("nonblind_denoising needs pa_frames 2, 4 or 6; found 0")
    if cfg["recal_all_flows"]:
        problems.append("recal_all_flows is true: no published weights use it; set it to false")
    if problems:
        raise ConfigError("netG: this VRT cannot be built", problems)
    return cfg


def _check_stages(cfg: dict[str, Any]) -> list[str]:
    problems = []
    dims, groups, reach = cfg["embed_dims"], cfg["deformable_groups"], cfg["pa_frames"] // 2
    for i, (dim, heads) in enumerate(zip(dims, cfg["num_heads"], strict=True)):
        if dim % heads:
            problems.append(f"embed_dims[{i}] is {dim}, which num_heads[{i}] = {heads} does not divide")
        if i < NUM_STAGES and dim % 4:
            problems.append(f"embed_dims[{i}] is {dim}: make it a multiple of 4, for the way up and the position code")
        if i < NUM_STAGES and reach and ((reach * dim) % groups or dim % reach):
            problems.append(
                f"embed_dims[{i}] is {dim}: {reach} x {dim} channels must divide into deformable_groups = {groups}, "
                f"and {dim} by {reach}"
            )
    for down, up in ((2, 4), (1, 5), (0, 6)):
        if dims[down] != dims[up]:
            problems.append(f"embed_dims[{down}] is {dims[down]} and embed_dims[{up}] {dims[up]}: they are added")
    if reach and (9 * groups) % reach:
        problems.append(f"deformable_groups is {groups}: pa_frames {2 * reach} needs a multiple of {reach}")
    if len(set(dims[NUM_STAGES:])) > 1:
        problems.append(f"embed_dims[7:] are {list(dims[NUM_STAGES:])}: these stages share one width")
    for i in cfg["indep_reconsts"]:
        if not NUM_STAGES <= i < len(dims):
            problems.append(f"indep_reconsts has {i}: it names stages from {NUM_STAGES} to {len(dims) - 1}")
    return problems


def check_clip(x: Tensor, *, channels: int, window: Sequence[int], pa_frames: int, num_in_frames: int) -> None:
    """Raise DataError if VRT cannot restore the clip ``x`` (B, D, C, H, W)."""
    if x.dim() != 5:
        raise DataError(f"the clip has shape {tuple(x.shape)}; VRT takes (batch, frames, channels, height, width)")
    _, frames, found, height, width = x.shape
    if found != channels:
        raise DataError(
            f"the clip has {found} channels and this VRT takes {channels}: give frames of {channels} channels "
            "(with nonblind_denoising the last is the map of noise levels), or set in_chans"
        )
    if pa_frames == 0 and frames != num_in_frames:
        raise DataError(
            f"the clip has {frames} frames and this VRT (pa_frames 0) fuses exactly img_size[0] = {num_in_frames}: "
            "give that many"
        )
    least_frames = max(2, pa_frames // 2 + 1)
    if frames < least_frames:
        raise DataError(
            f"the clip has {frames} frame(s); two-frame windows and pa_frames {pa_frames} need at least {least_frames}"
        )
    if height % SMALLEST_SCALE or width % SMALLEST_SCALE:
        raise DataError(
            f"the frames are {height} x {width}; the network halves them three times, so height and width must be "
            f"multiples of {SMALLEST_SCALE}: crop or pad them"
        )
    least = [SMALLEST_SCALE * w for w in window[1:]]
    if pa_frames:
        least = [max(side, FLOW_PYRAMID + SMALLEST_SCALE) for side in least]
    if height < least[0] or width < least[1]:
        raise DataError(
            f"the frames are {height} x {width}; window_size {list(window)} at 1/{SMALLEST_SCALE} scale and the flow "
            f"pyramid need at least {least[0]} x {least[1]}: use larger patches or a smaller window"
        )
