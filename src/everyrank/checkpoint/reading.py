"""Reading a checkpoint in one process. Nothing in it is executed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everyrank.checkpoint.encoding import decode_json
from everyrank.checkpoint.manifest import Manifest, read_manifest
from everyrank.checkpoint.shards import MARK, OWN, Layout, Places, own_name, put_together, shard_name
from everyrank.checkpoint.tensor_file import SUFFIX, TensorFile, read_tensors
from everyrank.checkpoint.writer import STATE
from everyrank.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint in memory.

    Attributes:
        step: Optimizer step at which it was taken.
        tensors: The tensors, on the CPU, by group and name.
        state: The state that is common to all ranks.
        rank_states: Each rank's own state, by the rank it had then.
        world_size: Number of ranks that took it.
        metric: Value it is ranked by, or None.
        path: Its folder.
        own_ranks: The ranks that saved tensors of their own.
    """

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    rank_states: list[dict[str, Any]]
    world_size: int
    metric: float | None
    path: Path
    own_ranks: frozenset[int] = frozenset()

    def own_tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """Read the tensors that a rank held by itself; empty if it had none, or they were not saved.

        Raises:
            CheckpointError: If there were some, but their file is not here or is damaged.
        """
        if rank not in self.own_ranks:
            return {}
        return read_tensors(self.path / (own_name(rank) + SUFFIX))


def read_checkpoint(path: Path) -> LoadedCheckpoint:
    """Read a checkpoint in this process alone, without comparing checksums.

    Raises:
        CheckpointError: If a file is missing or unreadable.
    """
    manifest, content = _read_texts(path)
    layouts = content.get("shards", [])
    return LoadedCheckpoint(
        step=manifest.step,
        tensors={group: read_group(path, group) for group in _groups(manifest, layouts)},
        state=decode_json(content["state"]),
        rank_states=decode_json(content["rank_states"]),
        world_size=manifest.world_size,
        metric=manifest.metric,
        path=path,
        own_ranks=frozenset(rank for rank in range(manifest.world_size) if own_name(rank) + SUFFIX in manifest.files),
    )


def group_names(path: Path) -> list[str]:
    """Return the names of a checkpoint's groups of tensors.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
    """
    manifest, content = _read_texts(path)
    return _groups(manifest, content.get("shards", []))


def read_group(path: Path, group: str) -> dict[str, torch.Tensor]:
    """Read one group of a checkpoint's tensors.

    Raises:
        CheckpointError: If a file is missing or unreadable.
    """
    stored = StoredGroup(path, group)
    return {name: stored.read(name) for name in stored.tensors}


class StoredGroup:
    """One group of a checkpoint's tensors, each read when it is asked for.

    Args:
        path: The checkpoint's folder.
        group: The group's name.

    Attributes:
        tensors: What each looks like, on the meta device.

    Raises:
        CheckpointError: If a file is missing or unreadable.
    """

    def __init__(self, path: Path, group: str) -> None:
        manifest, content = _read_texts(path)
        self.tensors: dict[str, torch.Tensor] = {}
        self._plain = TensorFile(path / (group + SUFFIX)) if group + SUFFIX in manifest.files else None
        if self._plain is not None:
            self.tensors.update(self._plain.looks())
        self._parts: dict[int, TensorFile] = {}
        self._places: dict[str, Places] = {}
        for rank, layout in enumerate(content.get("shards", [])):
            if not layout.get(group):
                continue
            self._parts[rank] = TensorFile(path / (shard_name(group, rank) + SUFFIX))
            for name, part in self._parts[rank].looks().items():
                self._places.setdefault(name, {})[rank] = layout[group][name]
                self.tensors[name] = torch.empty(layout[group][name][0], dtype=part.dtype, device="meta")

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, to the CPU.

        Raises:
            CheckpointError: If a file is missing or unreadable.
        """
        if name in self._places:
            return put_together(name, self._places[name], lambda rank: self._parts[rank].read(name))
        assert self._plain is not None
        return self._plain.read(name)


def _read_texts(path: Path) -> tuple[Manifest, dict[str, Any]]:
    try:
        return read_manifest(path), json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}") from error


def _groups(manifest: Manifest, layouts: list[Layout]) -> list[str]:
    stems = [name.removesuffix(SUFFIX) for name in manifest.files if name.endswith(SUFFIX)]
    whole = {stem for stem in stems if MARK not in stem and not stem.startswith(OWN)}
    return sorted(whole | {group for layout in layouts for group in layout})
