"""What a rank holds by itself: written by the rank, read by whoever needs it, no part of the common groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import everyrank
from everyrank.checkpoint.folder import list_checkpoints
from everyrank.checkpoint.reading import StoredCheckpoint, read_checkpoint
from everyrank.errors import CheckpointError


def save(folder: Path, background: bool) -> str:
    """Save what each rank has of its own; rank 1 has nothing. Then let one rank have what cannot be saved."""
    with everyrank.join(device="cpu") as world:
        with everyrank.Checkpointer(folder, world=world, background=background) as checkpointer:
            own = {} if world.rank == 1 else {"value": torch.full((3,), float(world.rank))}
            common: dict[str, Any] = {"tensors": {"model": {"weight": torch.ones(2)}}, "state": {}, "rank_state": {}}
            for step in (1, 2):
                checkpointer.save(step, **common, own_tensors=own)
            bad = {"value": torch.zeros(2, dtype=torch.complex128)} if world.rank == 2 else {}
            try:
                checkpointer.save(3, **common, own_tensors=bad)
            except CheckpointError as error:
                return str(error)
        return "saved"


@pytest.mark.parametrize("background", [True, False])
def test_each_rank_writes_its_own_and_all_are_verified(tmp_path: Path, background: bool) -> None:
    said = everyrank.launch(save, tmp_path, background, nproc_per_node=3)
    assert len(set(said)) == 1, "all ranks raise if one has a problem"
    assert "complex128" in said[0]
    found = list_checkpoints(tmp_path)
    assert [(info.step, info.verified) for info in found] == [(1, True), (2, True)]
    loaded = read_checkpoint(found[-1].path)
    assert set(loaded.tensors) == {"model"}
    assert StoredCheckpoint(found[-1].path).groups == ["model"]
    assert loaded.own_ranks == {0, 2}
    assert loaded.own_tensors(2)["value"].tolist() == [2.0, 2.0, 2.0]
    assert loaded.own_tensors(1) == {}
    (found[-1].path / "own.rank-00002.safetensors").unlink()
    assert list_checkpoints(tmp_path)[-1].verified is False, "a checkpoint without a rank's part is damaged"
    with pytest.raises(CheckpointError):
        loaded.own_tensors(2)


def test_the_name_is_kept_for_them(tmp_path: Path) -> None:
    checkpointer = everyrank.Checkpointer(tmp_path, world=everyrank.current_world())
    with pytest.raises(CheckpointError, match=r"'own.rank-' at the start"):
        checkpointer.save(1, tensors={"own.rank-0": {"x": torch.ones(1)}}, state={}, rank_state={})
