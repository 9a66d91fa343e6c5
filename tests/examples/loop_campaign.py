"""Runs examples/own_loop.py under SIGKILLs and on changing numbers of ranks, and audits its ledger.

    python loop_campaign.py FOLDER SEED WORLD_SIZE...

Each attempt but the last has one of its ranks killed at a random call: an optimizer step, or a call by which its
checkpoint is written. After a world size such as ``2t`` it gets a SIGTERM at a step instead. Prints one line of JSON.
torch is imported once; ranks are forked.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from everyrank.checkpoint.folder import list_checkpoints
from everyrank.runtime import torch_cures

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loop.py"
NUM_STEPS = 33
NUM_SAMPLES = 103


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def kill_at(owner: Any, name: str, number: int, how: int = signal.SIGKILL) -> None:
    """Send this process a signal at the given call of ``owner.name``, before or after it by turns."""
    original, count = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number and number % 2:
            os.kill(os.getpid(), how)
        result = original(*args, **kwargs)
        if count == number and not number % 2:
            os.kill(os.getpid(), how)
        return result

    setattr(owner, name, wrapped)


def run_rank(folder: Path, rank: int, world_size: int, port: int, kill: tuple[Any, ...] | None) -> int:
    """Fork one rank and return its process id."""
    child = os.fork()
    if child:
        return child
    with open(folder / f"rank-{rank}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if kill:
        kill_at(*kill)
    sys.argv = [str(EXAMPLE), "--folder", str(folder), "--ledger"]
    code = 0
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        print(f"rank {rank}: {error!r}", flush=True)
        code = 1
    sys.stdout.flush()
    os._exit(code)


def attempt(folder: Path, world_size: int, kill: tuple[Any, ...] | None, victim: int) -> list[int]:
    """Run the example once on ``world_size`` ranks; return how each ended."""
    port = free_port()
    ranks = [run_rank(folder, rank, world_size, port, kill if rank == victim else None) for rank in range(world_size)]
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


def committed(folder: Path, ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what this attempt wrote to the ledger, and strike out the steps that no whole checkpoint holds."""
    for file in folder.glob("ledger-*.jsonl"):
        lines = file.read_text().splitlines()
        ledger = ledger + [json.loads(line) for line in lines]
        file.unlink()
    durable = max((info.step for info in list_checkpoints(folder / "checkpoints") if info.verified), default=0)
    return [entry for entry in ledger if entry["step"] <= durable]


def main(folder: Path, seed: int, attempts: list[str]) -> None:
    rng = random.Random(seed)
    ledger: list[dict[str, Any]] = []
    ends = []
    for number, described in enumerate(attempts):
        world_size = int(described.rstrip("t"))
        kill: tuple[Any, ...] | None = None
        victim = rng.randrange(world_size)
        if described.endswith("t"):
            kill = (torch.optim.AdamW, "step", rng.randint(1, 12), signal.SIGTERM)
        elif number < len(attempts) - 1:
            kill = (torch.optim.AdamW, "step", rng.randint(1, 12))
            if rng.random() < 0.5:
                kill, victim = (os, rng.choice(["fsync", "rename", "write", "mkdir"]), rng.randint(1, 6)), 0
        ends.append(attempt(folder, world_size, kill, victim))
        ledger = committed(folder, ledger)
    used = {epoch: sorted(i for entry in ledger if entry["epoch"] == epoch for i in entry["ids"]) for epoch in range(3)}
    print(
        json.dumps(
            {
                "ends": ends,
                "exactly_once": all(ids == list(range(NUM_SAMPLES)) for ids in used.values()),
                "steps": sorted({entry["step"] for entry in ledger}) == list(range(1, NUM_STEPS + 1)),
                "resumed_from": sorted({entry["from"] for entry in ledger}),
            }
        )
    )


if __name__ == "__main__":
    torch_cures.install()  # before an optimizer's step is another function
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
