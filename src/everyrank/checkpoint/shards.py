"""Tensors that are spread over ranks (FSDP2): each rank writes its own part, and any number of ranks reads the whole.

torch.distributed.checkpoint stores such states too, but keeps its table of contents as a pickle, and nothing here ever
loads one. So a rank's parts are a safetensors file like all others, and where they belong is JSON: for each tensor its
global shape, and the offset of the part in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from everyrank.errors import CheckpointError

Layout = dict[str, dict[str, list[list[int]]]]
"""For each group and each tensor's name: the global shape, and the offset of one rank's part."""
Places = dict[int, list[list[int]]]
"""For each rank that has a part of one tensor: the global shape, and the part's offset."""

MARK = ".shard-"
OWN = "own.rank-"
_POLL_S = 0.005
_AFTER_END_S = 10.0  # how long a writer waits for another rank once its own training has ended


def shard_name(group: str, rank: int) -> str:
    """Return the name, without suffix, of the file that holds a rank's parts of a group."""
    return f"{group}{MARK}{rank:05d}"


def own_name(rank: int) -> str:
    """Return the name, without suffix, of the file of what a rank holds by itself."""
    return f"{OWN}{rank:05d}"


def is_spread(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor. Told by a method: importing the class costs more than half a second."""
    return hasattr(tensor, "full_tensor")


def laid_out_like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a tensor that every rank holds whole, laid out over the ranks as ``target`` is. Nothing is sent."""
    if not is_spread(target):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(target.device), mesh, placements, src_data_rank=None)


def local_parts(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[list[int]]]]:
    """Return this rank's parts of the tensors that are spread, and where each belongs. Not collective."""
    parts: dict[str, torch.Tensor] = {}
    layout: dict[str, list[list[int]]] = {}
    for name, tensor in tensors.items():
        if not is_spread(tensor):
            continue
        # The protocol by which torch.distributed.checkpoint asks a tensor for its parts.
        (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
        part = tensor.to_local().detach()  # type: ignore[attr-defined]
        if part.numel() or not tensor.numel():
            parts[name] = part
            layout[name] = [list(tensor.shape), list(chunk.offsets)]
    return parts, layout


def put_together(name: str, places: Places, read_part: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Put a spread tensor together from all ranks' parts.

    Args:
        name: Its name.
        places: For each rank that has a part of it: the global shape, and the part's offset.
        read_part: Returns a rank's part.

    Raises:
        CheckpointError: If the parts do not cover the tensor.
    """
    whole: torch.Tensor | None = None
    covered: dict[tuple[int, ...], int] = {}
    for rank, (shape, offsets) in places.items():
        part = read_part(rank)
        if whole is None:
            whole = torch.empty(shape, dtype=part.dtype)
        whole[tuple(slice(o, o + size) for o, size in zip(offsets, part.shape, strict=True))] = part
        covered[tuple(offsets)] = part.numel()  # replicas count once
    if whole is None or sum(covered.values()) != whole.numel():
        raise CheckpointError(f"The parts of {name!r} do not make it whole.")
    return whole


def wait_for_any(paths: list[Path], what: str, timeout_s: float) -> Path:
    """Wait until one of the paths exists, and return it. Other ranks make them, on a file system that all share.

    Raises:
        TimeoutError: If none does in time, or this process's training has ended and none has soon after.
    """
    deadline = time.monotonic() + timeout_s
    ended = False
    while True:
        for path in paths:
            if path.exists():
                return path
        if not ended and not threading.main_thread().is_alive():
            ended = True
            deadline = min(deadline, time.monotonic() + _AFTER_END_S)
        if time.monotonic() > deadline:
            folder = paths[0].parent
            raise TimeoutError(f"{what} did not come in time; do all ranks share the file system of {folder}?")
        time.sleep(_POLL_S)
