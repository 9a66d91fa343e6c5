"""Versions that must fit each other, launchers, and settings that are off."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from everyrank import __version__
from everyrank.doctor.check import Check, may_bite
from everyrank.elastic.machine import num_gpus
from everyrank.elastic.process.torch_bound import SUPPORTED, is_supported
from everyrank.errors import UserError
from everyrank.launch_env.detection import detect
from everyrank.rendezvous.interfaces import wrong_interface

_ANSWER_S = 10.0
# The command that starts, and those that may know its version.
_LAUNCHERS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    # Slurm's own commands ask its controller first, even for their version; its daemons do not.
    "Slurm": ("sbatch", (("sbatch", "--version"), ("slurmd", "-V"), ("slurmctld", "-V"))),
    "Open MPI": ("mpirun", (("mpirun", "--version"),)),
    "ssh": ("ssh", (("ssh", "-V"),)),
}
# Settings that slow a run down or break it, and what they do.
_OFF = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the last one: for debugging only",
    "NCCL_P2P_DISABLE": "GPUs of one machine talk through the host's memory",
    "NCCL_IB_DISABLE": "InfiniBand is not used",
    "NCCL_SHM_DISABLE": "ranks of one machine talk through the network",
    "TORCH_DISTRIBUTED_DEBUG": "every collective is compared over the ranks first, which doubles its time",
}


def check_versions() -> Iterator[Check]:
    """Python, everyrank and torch, and what torch was built for."""
    import torch

    yield Check("Python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Check("everyrank", "ok", __version__)
    found, fits = f"{torch.__version__} (supported: {SUPPORTED})", is_supported(torch.__version__)
    yield Check("torch", "ok" if fits else "wrong", found, "" if fits else f"pip install 'torch{SUPPORTED}'")
    present = num_gpus()
    if present and not torch.cuda.is_available():
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Check("CUDA", "wrong", f"{present} GPUs, but torch sees none: {built}", "install torch for your driver")
    elif present:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Check("CUDA", "ok", f"CUDA {torch.version.cuda}, NCCL {nccl}, driver {_driver()}; {names}")
        if present > 1:
            code, text = _said(["nvidia-smi", "topo", "-m"])
            yield Check("GPU links", "ok", text.strip() if code == 0 else "unknown (nvidia-smi topo -m says nothing)")
    else:
        yield Check("CUDA", "ok", "no GPU here: ranks run on the CPU with gloo")


def check_launchers() -> Iterator[Check]:
    """Which launchers are there, in which version, and whether their clusters answer."""
    for name, (program, questions) in _LAUNCHERS.items():
        path = shutil.which(program)
        if path is None:
            yield Check(name, "ok", "not installed")
            continue
        said = (_said(question) for question in questions if shutil.which(question[0]))
        version = next((text.splitlines()[0] for code, text in said if code == 0 and text), "in an unknown version")
        yield Check(name, "ok", f"{version} at {path}")
    if shutil.which("sinfo"):
        code, text = _said(["sinfo", "--noheader", "--format=%P %D %t"])
        answers = code == 0
        lines = text.strip().splitlines()
        found = "; ".join(lines[:4]) if answers else f"does not answer: {next(reversed(lines), '')}"
        fix = "driver=slurm needs a controller: check SLURM_CONF and that slurmctld runs"
        yield may_bite("Slurm's controller", found, not answers, fix)
    try:
        yield Check("Ray", "ok", importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        yield Check("Ray", "ok", "not installed")


def check_settings(environ: Mapping[str, str]) -> Iterator[Check]:
    """Variables that say who this process is, and those that are off."""
    try:
        found = detect(environ, [])
        yield Check("launcher variables", "ok", f"{found.launcher} (by {found.detected_by})")
    except UserError as error:
        yield Check("launcher variables", "wrong", str(error).partition("\nFix: ")[0], "unset them, or set them all")
    if environ.get("MASTER_PORT") and not environ.get("RANK"):
        port = environ["MASTER_PORT"]
        yield Check("MASTER_PORT", "warn", f"{port} is set for every run of this shell", "unset MASTER_PORT")
    for name, effect in _OFF.items():
        value = environ.get(name, "")
        if value not in ("", "0", "OFF", "INFO"):
            yield Check(name, "warn", f"{value}: {effect}", f"unset {name}")
    problem = wrong_interface(environ, None, nccl=num_gpus() > 0)
    if problem:
        found_text, _, fix = problem.partition("Fix: ")
        yield Check(problem.partition("=")[0], "wrong", found_text.strip(), fix)


def _said(command: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"{type(error).__name__} after {_ANSWER_S:g} s"
    return done.returncode, done.stdout or done.stderr


def _driver() -> str:
    code, text = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return text.splitlines()[0] if code == 0 and text else "unknown"
