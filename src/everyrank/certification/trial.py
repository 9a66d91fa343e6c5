"""One line of the certificate: an app run under a launcher, hurt, and run again until it is done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everyrank.certification.launchers import Launcher
from everyrank.errors import EXIT_OK, EXIT_PREEMPTED, EveryrankError

_PATIENCE_S = 180.0
_MAX_LAUNCHES = 12


@dataclass(frozen=True)
class Trial:
    """What is done to a run.

    Attributes:
        launcher: Who starts it.
        world_sizes: World size of each launch in turn; the last one repeats until the run is done.
        fault: ``""``, ``"SIGKILL rank"``, ``"SIGKILL launcher"``, ``"SIGTERM launcher"``, ``"SIGTERM rank"``.
        num_faults: How many launches are hurt.
        extra: Further overrides.
    """

    launcher: Launcher
    world_sizes: tuple[int, ...]
    fault: str = ""
    num_faults: int = 0
    extra: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The world sizes as the certificate shows them."""
        return " → ".join(str(size) for size in self.world_sizes)

    @property
    def faults(self) -> str:
        """The faults as the certificate shows them."""
        return f"{self.num_faults} x {self.fault}" if self.num_faults else "-"


def carry_out(trial: Trial, run: Path, overrides: Sequence[str], chance: random.Random) -> int:
    """Launch, hurt and relaunch until the run has ended by itself.

    Returns:
        The number of launches.

    Raises:
        EveryrankError: A launch that was not hurt failed, or the run does not come to an end.
    """
    run.mkdir(parents=True, exist_ok=True)
    for launch in range(_MAX_LAUNCHES):
        size = trial.world_sizes[min(launch, len(trial.world_sizes) - 1)]
        args = [*overrides, f"run.dir={run}", *trial.extra]
        hurt = launch < trial.num_faults
        with (run / f"launch-{launch}.log").open("w") as log:
            process = subprocess.Popen(
                trial.launcher.command(size, args),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                if hurt:
                    _hurt(process, trial.fault, run, chance)
                code = process.wait(timeout=_PATIENCE_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code == EXIT_OK and launch + 1 >= len(trial.world_sizes):
            return launch + 1
        if code not in (EXIT_OK, EXIT_PREEMPTED) and not hurt:
            tail = "\n".join((run / f"launch-{launch}.log").read_text(errors="replace").splitlines()[-15:])
            raise EveryrankError(f"launch {launch} by {trial.launcher.name} ended with exit code {code}:\n{tail}")
    raise EveryrankError(f"the run did not end in {_MAX_LAUNCHES} launches")


def _hurt(process: subprocess.Popen[bytes], fault: str, run: Path, chance: random.Random) -> None:
    """Wait until some steps more are committed, then send the signal."""
    target = _num_committed(run) + chance.randint(1, 4)
    deadline = time.monotonic() + _PATIENCE_S
    while _num_committed(run) < target:
        if process.poll() is not None:
            return  # it was done before it could be hurt
        if time.monotonic() > deadline:
            raise EveryrankError("the run commits no steps")
        time.sleep(0.005)
    name, _, victim = fault.partition(" ")
    pid = process.pid
    if victim == "rank":
        ranks = leaves(process.pid)
        if not ranks:
            return
        pid = chance.choice(ranks)
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        return


def _num_committed(run: Path) -> int:
    return len(list((run / "ledger").glob("step-*.jsonl")))


def leaves(root: int) -> list[int]:
    """Descendants of a process that have no children of their own: the ranks, whatever launched them."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue  # it ended while we looked
            children.setdefault(parent, []).append(int(name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        below = children.get(pid, [])
        waiting += below
        if not below and pid != root and not _is_helper(pid):
            found.append(pid)
    return sorted(found)


def _is_helper(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except OSError:
        return True
