"""What each rank of a world does that saves, fails and loads together; every rank must return the same."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from everyrank import Checkpointer, CheckpointError, World, gather_objects, join


def save_all(world: World, checkpointer: Checkpointer, step: int, **rank_state: Any) -> None:
    # each rank holds something else: rank 0's is saved
    tensors = {"model": {"w": torch.full((50_000,), float(world.rank + 10 * step))}}
    checkpointer.save(step, tensors=tensors, state={"rank": world.rank}, rank_state={"rank": world.rank, **rank_state})


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""


def saving(world: World, folder: Path) -> dict[str, Any]:
    checkpointer = Checkpointer(folder, world=world)
    save_all(world, checkpointer, 1)
    save_all(world, checkpointer, 2)
    latest = checkpointer.latest()
    assert latest is not None
    # a rank's state that cannot be written is an error on all of them
    bad = {"odd": object()} if world.rank == world.world_size - 1 else {}
    refused = error_of(lambda: save_all(world, checkpointer, 3, **bad))
    # the writer's error reaches all of them at the next save; or at once, in the foreground
    hidden = folder.with_name("hidden")
    gather_objects(None)
    if world.is_main:
        shutil.move(folder, hidden)
    save_all(world, checkpointer, 4)
    background = error_of(lambda: save_all(world, checkpointer, 5))
    blocking = Checkpointer(folder.with_name("gone"), world=world, background=False)
    gather_objects(None)
    if world.is_main:
        shutil.rmtree(folder.with_name("gone"))
    gather_objects(None)
    foreground = error_of(lambda: save_all(world, blocking, 7))
    if world.is_main:
        shutil.move(hidden, folder)
    gather_objects(None)
    checkpointer.close()
    return {"latest": latest.step, "refused": refused, "background": background, "foreground": foreground}


def loading(world: World, folder: Path) -> dict[str, Any]:
    checkpointer = Checkpointer(folder, world=world)
    latest = checkpointer.latest()
    assert latest is not None
    loaded = checkpointer.load(latest)
    if world.rank == 1:  # a node that does not share the file system
        Path.is_dir = lambda self: False  # type: ignore[method-assign, assignment]
    again = checkpointer.load(latest)
    assert torch.equal(again.tensors["model"]["w"], loaded.tensors["model"]["w"])
    damaged = folder / "step-00000001"
    if world.is_main:
        (damaged / "model.safetensors").write_bytes(b"")
    refused = error_of(lambda: checkpointer.load(damaged))
    return {
        "step": loaded.step,
        "weight": float(loaded.tensors["model"]["w"][0]),
        "state": loaded.state,
        "rank_states": loaded.rank_states,
        "world_size": loaded.world_size,
        "refused": refused,
    }


def spread(world: World, folder: Path) -> dict[str, Any]:
    """Save a model whose parameters FSDP2 has spread over the ranks: gathered, and each rank its own part."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    # 5 rows do not divide by the ranks, and with 1 row some ranks have none
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1))
    fully_shard(model)
    tensors = {"model": {**model.state_dict(), "plain": torch.arange(3)}, "plain": {"x": torch.ones(2)}, "empty": {}}
    for name, sharded in (("gathered", False), ("sharded", True)):
        checkpointer = Checkpointer(folder / name, world=world, sharded=sharded)
        for step in (1, 2):
            checkpointer.save(step, tensors=tensors, state={}, rank_state={"rank": world.rank})
        checkpointer.wait()
        gather_objects(None)
    blocking = Checkpointer(folder / "failed", world=world, sharded=True, background=False)
    if world.rank == world.world_size - 1:  # this rank's disk is full
        patch("everyrank.checkpoint.writer.write_file", side_effect=OSError("no room")).start()
    failed = error_of(lambda: blocking.save(1, tensors=tensors, state={}, rank_state={}))
    return {"failed": "could not be written" in failed, "left": os.listdir(folder / "failed")}


def whole(world: World, folder: Path) -> dict[str, Any]:
    """Load both checkpoints, of ranks that may have been more or fewer, and compare them with the model itself."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1))
    same = []
    for name in ("gathered", "sharded"):
        checkpointer = Checkpointer(folder / name, world=world)
        latest = checkpointer.latest()
        assert latest is not None
        tensors = checkpointer.load(latest).tensors
        assert set(tensors) == {"model", "plain", "empty"}
        assert torch.equal(tensors["model"].pop("plain"), torch.arange(3))
        expected = model.state_dict()
        same.append(tensors["model"].keys() == expected.keys())
        same += [torch.equal(tensors["model"][key], expected[key]) for key in expected]
    return {"same": all(same), "files": sorted(os.listdir(folder / "sharded" / "step-00000002"))}


def run(folder: Path, what: str) -> dict[str, Any]:
    """Do ``save``, ``load``, ``spread`` or ``whole`` with the checkpoints in a folder."""
    with join(timeout_s=60, device="cpu") as world:
        report = {"save": saving, "load": loading, "spread": spread, "whole": whole}[what](world, folder)
        # FSDP2's objects refer to each other and to the group; what outlives the group can abort the process's end.
        gc.collect()
    return report
