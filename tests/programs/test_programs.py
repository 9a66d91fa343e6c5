"""Programs that nobody here wrote, unchanged, under every launcher of this machine."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import ROOT, cli_environment
from programs.others import programs

DRIVERS = ("torchrun", "spawn", "launch", *(("mpi",) if shutil.which("mpirun") else ()))
RAY_TOO = "accelerate_sync"
RAY = ("ray",) if importlib.util.find_spec("ray") else ()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(programs()))
def test_a_program_of_others_does_its_work_under_every_launcher(tmp_path: Path, name: str) -> None:
    program = programs()[name]

    def run(driver: str) -> str:
        """What is wrong with it."""
        (tmp_path / driver).mkdir()
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), "-n2", *program.settings, f"driver={driver}", "--", program.script],
            cwd=tmp_path / driver,
            env={**cli_environment(), **program.env, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )
        if done.returncode == 0 and not program.missing(done.stdout):
            return ""
        return f"== {driver}: exit code {done.returncode}, {program.missing(done.stdout)}:\n{done.stdout[-3000:]}"

    drivers = DRIVERS + (RAY if name == RAY_TOO else ())
    with ThreadPoolExecutor(2) as two:
        assert not any(wrong := list(two.map(run, drivers))), "\n".join(wrong)
