"""Apps for the tests of several nodes: they loop over collectives and write down in which world they are."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

import everyrank
from everyrank.errors import Preempted
from everyrank.runtime.preemption import PreemptionWatch


class Loops:
    """Sums over the ranks until the file ``stop`` is there, and leaves ``world-<attempt>-<size>`` of each world.

    Progress is a number that rank 0 saves as a checkpoint would be: each world goes on from it.
    """

    def run(self, cfg: DictConfig) -> dict[str, int]:
        folder = Path(cfg.app.folder)
        with everyrank.join(**cfg.distributed) as world, PreemptionWatch() as watch:
            state = _load(folder / "state.json")
            attempt = world.restart_count
            _write(
                folder / f"pid-{os.environ.get('HOSTNAME', '')}{os.uname().nodename}-{world.local_rank}", os.getpid()
            )
            while True:
                total = int(everyrank.reduce_sum(torch.tensor(1)).item())
                assert total == world.world_size
                state["steps"] += 1
                if world.is_main:
                    _write(folder / "state.json", state)
                    _write(folder / f"world-{attempt}-{world.world_size}", state["steps"])
                told = watch.agreed()
                if told:
                    raise Preempted(f"told to stop by {told} after step {state['steps']}")
                if everyrank.broadcast_decision((folder / "stop").exists()):
                    return {"steps": state["steps"], "world_size": world.world_size}
                time.sleep(0.02)  # an optimizer step


class Listeners:
    """Sums over the ranks, and prints the addresses on which anything new listens in this network namespace.

    Not new are the sockets of ``app.before``, as /proc/net/tcp writes them. Then one rank is killed; in the next
    attempt it raises.
    """

    def run(self, cfg: DictConfig) -> None:
        with everyrank.join(**cfg.distributed) as world:
            total = int(everyrank.reduce_sum(torch.tensor(world.rank)).item())
            if world.is_main:
                print(f"sum {total}, niceness {os.nice(0)}", flush=True)
                print(f"somebody listens on {', '.join(sorted(_listening(cfg.app.before)))}", flush=True)
            everyrank.barrier()
            if world.rank == cfg.app.guilty and not world.restart_count:
                os.kill(os.getpid(), signal.SIGKILL)
            if world.rank == cfg.app.guilty:
                raise LookupError(f"the sample {world.rank} is missing")
            everyrank.barrier()


def _listening(before: Sequence[str]) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            digits = local.partition(":")[0]
            # TCP_LISTEN of the kernel's include/net/tcp_states.h; words in the machine's byte order
            if state == "0A" and local not in before:
                words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
                address = ipaddress.ip_address(b"".join(words))
                found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found


def _load(path: Path) -> dict[str, int]:
    return json.loads(path.read_text()) if path.exists() else {"steps": 0}


def _write(path: Path, value: object) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value))
    partial.rename(path)


class Script:
    """A plain Python script, run as it is."""

    def run(self, cfg: DictConfig) -> None:
        raise AssertionError("an app with a command is not run in Python")

    def build_command(self, cfg: DictConfig) -> list[str]:
        return [cfg.app.script]
