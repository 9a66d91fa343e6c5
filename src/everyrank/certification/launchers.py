"""The launchers that are found on this machine, and the command by which each starts an app."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from everyrank.errors import UserError, did_you_mean

_RUN = ("-m", "everyrank", "run")


@dataclass(frozen=True)
class Launcher:
    """A way to start an app.

    Attributes:
        name: What the certificate calls it.
        command: Turns a world size and Hydra overrides into a command.
    """

    name: str
    command: Callable[[int, Sequence[str]], list[str]]


def find_launchers() -> tuple[list[Launcher], list[str]]:
    """Return the launchers of this machine, and for each that is missing a line that says why."""
    found = [
        *(Launcher(f"driver={name}", partial(_driver, name)) for name in ("torchrun", "spawn", "launch")),
        Launcher("torchrun", _bare_torchrun),
    ]
    missing = []
    if shutil.which("mpirun"):
        found.append(Launcher("mpirun", _mpirun))
    else:
        missing.append("mpirun: not installed")
    reason = _why_no_slurm()
    if reason is None:
        found.append(Launcher("srun", _srun))
    else:
        missing.append(f"srun: {reason}")
    if importlib.util.find_spec("ray"):
        found.append(
            Launcher("driver=ray", lambda n, args: [*_python(), "driver=ray", f"driver.num_workers={n}", *args])
        )
    else:
        missing.append("driver=ray: not installed (pip install 'everyrank[ray]')")
    return found, missing


def choose_launchers(names: Sequence[str], found: Sequence[Launcher], missing: Sequence[str]) -> list[Launcher]:
    """Return the launchers that were asked for.

    Raises:
        UserError: A name is unknown, or its launcher is not on this machine.
    """
    chosen = []
    for name in (name.strip() for name in names):
        if name in ("", "python"):
            continue  # plain Python is what the others are compared with, in any case
        launcher = next((launcher for launcher in found if launcher.name == name), None)
        why_not = next((line for line in missing if line.split(":")[0] == name), None)
        if launcher is None:
            known = [launcher.name for launcher in found]
            raise UserError(
                f"--launchers={name} was given, but "
                + (f"{why_not}. " if why_not else "it is no launcher that everyrank certifies. ")
                + f"This machine has {', '.join(known)}.{did_you_mean(name, known)}"
            )
        chosen.append(launcher)
    if not chosen:
        raise UserError("--launchers was given without a name, such as --launchers=srun,mpirun.")
    return chosen


def plain_python() -> Launcher:
    """One process, no launcher."""
    return Launcher("python", lambda _n, args: [*_python(), "driver=local", "driver.threads_per_rank=1", *args])


def _python() -> list[str]:
    return [sys.executable, *_RUN]


def _driver(name: str, world_size: int, args: Sequence[str]) -> list[str]:
    return [*_python(), f"driver={name}", f"driver.nproc_per_node={world_size}", *args]


def _bare_torchrun(world_size: int, args: Sequence[str]) -> list[str]:
    run_dir = next(arg.partition("=")[2] for arg in args if arg.startswith("run.dir="))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return [*torchrun, f"--log-dir={run_dir}/logs/torchrun", *_RUN, *args]


def _mpirun(world_size: int, args: Sequence[str]) -> list[str]:
    flags = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    return ["mpirun", "-np", str(world_size), *flags, *_python(), *args]


def _srun(world_size: int, args: Sequence[str]) -> list[str]:
    return ["srun", f"--ntasks={world_size}", "--overcommit", *_python(), *args]


def _why_no_slurm() -> str | None:
    if not shutil.which("srun") or not shutil.which("sinfo"):
        return "not installed"
    try:
        subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "installed, but no cluster answers"
    return None
