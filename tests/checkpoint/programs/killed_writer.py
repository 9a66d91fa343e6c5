"""Saves checkpoints in child processes that are SIGKILLed at each system call of a save in turn; checks what is left.

    python killed_writer.py FOLDER SCENARIO

Prints one line of JSON: how many calls were tried, and which steps were found afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from everyrank import current_world
from everyrank.checkpoint.checkpointer import Checkpointer

# Every call by which a save changes what is on disk.
CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")
NUM_VALUES = 30_000


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((NUM_VALUES,), value)}, "optimizer": {"m": torch.full((7,), value)}}


def save(folder: Path, step: int, value: float, **options: Any) -> None:
    with Checkpointer(folder, world=current_world(), **options) as checkpointer:
        checkpointer.save(step, tensors=tensors(value), state={"value": value}, rank_state={"value": value})


def in_child(task: Callable[[], None]) -> int:
    """Run a task in a forked child and return its wait status."""
    child = os.fork()
    if child == 0:
        task()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def die_at(call_number: int, moment: str) -> None:
    """Make this process die at one of its next calls: before it, after it, or half-way through a write."""
    count = 0

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call_number:
                if moment == "half" and name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                elif moment == "after":
                    original(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, wrapped)

    for name in CALLS:
        wrap(name)


def check(folder: Path, allowed: dict[int, set[float]]) -> int:
    """Find and load what a killed save has left, and return its step."""
    checkpointer = Checkpointer(folder, world=current_world())
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name.endswith(".replaced")]
    assert not hidden, hidden
    info = checkpointer.latest()
    assert info is not None, "no checkpoint is left"
    loaded = checkpointer.load(info)
    value = loaded.state["value"]
    assert value in allowed.get(info.step, set()), (info.step, value)
    assert torch.equal(loaded.tensors["model"]["w"], tensors(value)["model"]["w"])
    assert loaded.rank_states == [{"value": value}]
    return info.step


def campaign(folder: Path, scenario: str) -> dict[str, Any]:
    """Kill at every call and every moment of it, until the save gets through."""
    step = 1 if scenario == "replace" else 2
    allowed = {1: {1.0, 2.0}} if scenario == "replace" else {1: {1.0}, 2: {2.0}}
    options = {"background": scenario != "foreground", "keep_last": 1 if scenario == "retention" else 3, "keep_best": 0}
    found, num_kills = [], 0
    for moment in ("before", "half", "after"):
        for call_number in range(1, 1000):
            shutil.rmtree(folder, ignore_errors=True)
            save(folder, 1, 1.0)

            def attempt(call_number: int = call_number, moment: str = moment) -> None:
                die_at(call_number, moment)
                save(folder, step, 2.0, **options)

            status = in_child(attempt)
            found.append(check(folder, allowed))
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            num_kills += 1
    return {"num_kills": num_kills, "found": sorted(set(found))}


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), sys.argv[2])))
