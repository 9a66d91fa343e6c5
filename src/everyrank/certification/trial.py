"""One line of the certificate: an app run under a launcher, hurt, and run again until it is done."""

from __future__ import annotations

import os
import random
import select
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
_DEATH_S = 10.0  # how long a killed process has to be gone


@dataclass(frozen=True)
class Trial:
    """What is done to a run.

    Attributes:
        launcher: Who starts it.
        world_sizes: World size of each launch in turn; the last one repeats until the run is done.
        fault: ``""``, ``"SIGKILL rank"``, ``"SIGKILL launcher"``, ``"SIGTERM launcher"``, ``"SIGTERM rank"``.
        num_faults: How many launches are hurt.
        extra: Further overrides.
        moves: The run's folder is moved after the first launch that was hurt, and the run goes on in its new place.
    """

    launcher: Launcher
    world_sizes: tuple[int, ...]
    fault: str = ""
    num_faults: int = 0
    extra: tuple[str, ...] = ()
    moves: bool = False

    @property
    def title(self) -> str:
        """The world sizes as the certificate shows them."""
        return " → ".join(str(size) for size in self.world_sizes)

    def faults(self, num_delivered: int) -> str:
        """The faults as the certificate shows them: those that were delivered."""
        if not self.num_faults:
            return "-"
        of = "" if num_delivered == self.num_faults else f" of {self.num_faults}"
        return f"{num_delivered}{of} x {self.fault}"


def carry_out(trial: Trial, run: Path, overrides: Sequence[str], chance: random.Random) -> tuple[Path, int]:
    """Launch, hurt and relaunch until the run has ended by itself.

    Returns:
        The run's folder, and how many faults were delivered: the signal was sent to what it was meant for, and it
        ended by it.

    Raises:
        EveryrankError: A launch that was not hurt failed, or the run does not come to an end.
    """
    run.mkdir(parents=True, exist_ok=True)
    num_delivered = 0
    for launch in range(_MAX_LAUNCHES):
        size = trial.world_sizes[min(launch, len(trial.world_sizes) - 1)]
        args = [*overrides, f"run.dir={run}", *trial.extra]
        hurt = num_delivered < trial.num_faults
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
                was_sent = hurt and _hurt(process, trial.fault, run, chance)
                code = process.wait(timeout=_PATIENCE_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if was_sent and _took_effect(trial, code):
            num_delivered += 1
            if trial.moves and num_delivered == 1:
                run = run.rename(run.with_name(f"{run.name}-moved"))
        if code == EXIT_OK and launch + 1 >= len(trial.world_sizes):
            return run, num_delivered
        if code not in (EXIT_OK, EXIT_PREEMPTED) and not was_sent:
            tail = "\n".join((run / f"launch-{launch}.log").read_text(errors="replace").splitlines()[-15:])
            raise EveryrankError(f"launch {launch} by {trial.launcher.name} ended with exit code {code}:\n{tail}")
    raise EveryrankError(f"the run did not end in {_MAX_LAUNCHES} launches")


def _took_effect(trial: Trial, code: int) -> bool:
    """Whether a launch ended as one does that got the signal."""
    name, _, victim = trial.fault.partition(" ")
    if name == "SIGTERM":
        return code == EXIT_PREEMPTED
    if victim == "launcher":
        return code == -signal.SIGKILL
    return code != EXIT_OK or "driver.max_restarts=1" in trial.extra


def _hurt(process: subprocess.Popen[bytes], fault: str, run: Path, chance: random.Random) -> bool:
    """Wait until some steps more are committed, then send the signal; whether it was sent to a living process."""
    # Steps that the launch before has left pending are confirmed by this one, before it takes any of its own.
    target = _num_committed(run, "step-*") + chance.randint(1, 3)
    deadline = time.monotonic() + _PATIENCE_S
    while _num_committed(run) < target:
        if process.poll() is not None:
            return False  # it was done before it could be hurt
        if time.monotonic() > deadline:
            raise EveryrankError("the run commits no steps")
        time.sleep(0.005)
    name, _, victim = fault.partition(" ")
    pid = process.pid
    if victim == "rank":
        found = ranks(process.pid, run)
        if not found:
            return False
        pid = chance.choice(found)
    try:
        handle = os.pidfd_open(pid)  # of this very process, should its number be given to another
    except ProcessLookupError:
        return False
    try:
        signal.pidfd_send_signal(handle, getattr(signal, name))
        if name == "SIGKILL":
            return bool(select.select([handle], [], [], _DEATH_S)[0])
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def _num_committed(run: Path, files: str = "step-*.jsonl") -> int:
    return len(list((run / "ledger").glob(files)))


def ranks(root: int, run: Path) -> list[int]:
    """Descendants of a process that are ranks of a run, whatever launched them: each has its log open.

    A child of a rank, such as a loader process, has inherited the log: it is not one.
    """
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue  # it ended while we looked
            if state != "Z":
                parents[int(name)] = int(parent)
    below, waiting = set[int](), [root]
    while waiting:
        children = [pid for pid, parent in parents.items() if parent == waiting[-1]]
        waiting.pop()
        waiting += children
        below.update(children)
    found = {pid for pid in below | {root} if _has_rank_log(pid, run)}
    return sorted(pid for pid in found if parents.get(pid) not in found)


def _has_rank_log(pid: int, run: Path) -> bool:
    prefix = f"{run.resolve()}/logs/rank-"
    try:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}").startswith(prefix) for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False
