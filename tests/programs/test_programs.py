"""Programs that nobody here wrote, unchanged, under every launcher; each proves that both ranks did the work."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import ROOT, cli_environment

SCRIPTS = Path(__file__).parent / "scripts"
DRIVERS = ("torchrun", "spawn", "launch", *(("mpi",) if shutil.which("mpirun") else ()))


@dataclass(frozen=True)
class Program:
    """A program, and what both ranks together must have said: each pattern, so many times."""

    script: Path
    said: dict[str, int]
    env: dict[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


def _of_package(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / path


def _programs() -> dict[str, Program]:
    cpu = {"ACCELERATE_USE_CPU": "true"}
    return {
        "accelerate_script": Program(
            _of_package("accelerate", "test_utils/scripts/test_script.py"),
            {r"^Num processes: 2": 2, "Training integration test": 1},
            cpu,
        ),
        "accelerate_sync": Program(
            _of_package("accelerate", "test_utils/scripts/test_sync.py"),
            {"Test Distributed `no_sync` context manager": 1},
            cpu,
        ),
        # On a CPU two ranks of it are two jobs of one process: only where it believes in CUDA does it meet the others.
        "accelerate_ops": Program(
            _of_package("accelerate", "test_utils/scripts/test_ops.py"),
            {r"MULTI_GPU  Backend: nccl\nNum processes: 2": 1, "testing sending tensors across devices": 1},
            settings=("rehearse=cpu",),
        ),
        "launcher": Program(SCRIPTS / "launcher_script.py", {r"^launcher rank [01] of 2: \[1, 1\] came": 2}),
        "fabric": Program(SCRIPTS / "fabric_script.py", {r"^fabric rank [01] of 2: equal weights": 2}),
        "ignite": Program(SCRIPTS / "ignite_script.py", {r"^ignite rank [01] of 2 by native-dist: agreed": 2}),
        "graphs": Program(
            SCRIPTS / "graphs_script.py",
            {r"^graphs rank [01] of 2: 4 of 8 graphs": 2},
            env={"TMPDIR": "."},  # PyTorch Geometric writes the code of its layers there, and leaves it
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_programs()))
def test_a_program_of_others_does_its_work_under_every_launcher(tmp_path: Path, name: str) -> None:
    program = _programs()[name]

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
        counts = {pattern: len(re.findall(pattern, done.stdout, re.MULTILINE)) for pattern in program.said}
        if done.returncode == 0 and all(counts[pattern] >= least for pattern, least in program.said.items()):
            return ""
        return f"== {driver}: exit code {done.returncode}, {counts}:\n{done.stdout[-3000:]}"

    with ThreadPoolExecutor(2) as two:
        assert not any(wrong := list(two.map(run, DRIVERS))), "\n".join(wrong)
