"""Reading a checkpoint in one process. Nothing in it is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everyrank.checkpoint.encoding import decode_json
from everyrank.checkpoint.manifest import read_manifest
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
    stored = StoredCheckpoint(path)
    manifest, content = stored.manifest, stored.content
    groups = {name: stored.group(name) for name in stored.groups}
    return LoadedCheckpoint(
        step=manifest.step,
        tensors={name: {tensor: group.read(tensor) for tensor in group.tensors} for name, group in groups.items()},
        state=decode_json(content["state"]),
        rank_states=decode_json(content["rank_states"]),
        world_size=manifest.world_size,
        metric=manifest.metric,
        path=path,
        own_ranks=frozenset(rank for rank in range(manifest.world_size) if own_name(rank) + SUFFIX in manifest.files),
    )


class StoredCheckpoint:
    """A checkpoint on the disk, of which only the texts are read yet.

    Args:
        path: Its folder.

    Attributes:
        manifest: What it says of itself.
        content: The JSON of its state, not decoded.
        groups: The names of its groups of tensors.

    Raises:
        CheckpointError: If a text is missing or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.manifest = read_manifest(path)
            self.content: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, CheckpointError) as error:
            raise CheckpointError(f"The checkpoint {path} cannot be read: {error}") from error
        self._layouts: list[Layout] = self.content.get("shards", [])
        stems = [name.removesuffix(SUFFIX) for name in self.manifest.files if name.endswith(SUFFIX)]
        whole = {stem for stem in stems if MARK not in stem and not stem.startswith(OWN)}
        self.groups = sorted(whole | {group for layout in self._layouts for group in layout})

    def group(self, name: str) -> StoredGroup:
        """Open one group of tensors.

        Raises:
            CheckpointError: If a file is missing or unreadable.
        """
        plain = self._path / (name + SUFFIX) if name + SUFFIX in self.manifest.files else None
        parts = {
            rank: (self._path / (shard_name(name, rank) + SUFFIX), layout[name])
            for rank, layout in enumerate(self._layouts)
            if layout.get(name)
        }
        return StoredGroup(plain, parts)


class StoredGroup:
    """One group of a checkpoint's tensors, each read when it is asked for.

    Args:
        plain: The file of the tensors that are whole, if there are any.
        parts: For each rank that wrote parts of tensors, their file and where each part belongs.

    Attributes:
        tensors: What each looks like, on the meta device.

    Raises:
        CheckpointError: If a file is missing or unreadable.
    """

    def __init__(self, plain: Path | None, parts: Mapping[int, tuple[Path, Mapping[str, Any]]]) -> None:
        self._plain = TensorFile(plain) if plain is not None else None
        self.tensors: dict[str, torch.Tensor] = self._plain.looks() if self._plain is not None else {}
        self._parts = {rank: TensorFile(path) for rank, (path, _) in parts.items()}
        self._places: dict[str, Places] = {}
        for rank, (_, layout) in parts.items():
            for name, part in self._parts[rank].looks().items():
                self._places.setdefault(name, {})[rank] = layout[name]
                self.tensors[name] = torch.empty(layout[name][0], dtype=part.dtype, device="meta")

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, to the CPU.

        Raises:
            CheckpointError: If a file is missing or unreadable.
        """
        if name in self._places:
            return put_together(name, self._places[name], lambda rank: self._parts[rank].read(name))
        assert self._plain is not None
        return self._plain.read(name)
