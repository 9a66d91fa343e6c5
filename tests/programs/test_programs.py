"""Programs that nobody here wrote, unchanged, under every launcher; each proves that both ranks did the work."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import ROOT, cli_environment

SCRIPTS = Path(__file__).parent / "scripts"
DRIVERS = ("torchrun", "spawn", "launch", "mpi")


@dataclass(frozen=True)
class Program:
    """A program, and what both ranks together must have said: each pattern, so many times."""

    script: Path
    said: dict[str, int]
    env: dict[str, str] = field(default_factory=dict)


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
        "fabric": Program(SCRIPTS / "fabric_script.py", {r"^fabric rank [01] of 2: equal weights": 2}),
        "ignite": Program(SCRIPTS / "ignite_script.py", {r"^ignite rank [01] of 2 by native-dist: agreed": 2}),
        "graphs": Program(SCRIPTS / "graphs_script.py", {r"^graphs rank [01] of 2: 4 of 8 graphs": 2}),
    }


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("name", sorted(_programs()))
def test_a_program_of_others_does_its_work_under_every_launcher(tmp_path: Path, name: str) -> None:
    program = _programs()[name]
    started = {}
    for driver in DRIVERS:
        (tmp_path / driver).mkdir()
        started[driver] = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), "-n", "2", f"driver={driver}", "--", str(program.script)],
            cwd=tmp_path / driver,
            env={**cli_environment(), **program.env, "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    wrong = {}
    for driver, process in started.items():
        output, _ = process.communicate(timeout=280)
        counts = {pattern: len(re.findall(pattern, output, re.MULTILINE)) for pattern in program.said}
        if process.returncode or any(counts[pattern] < least for pattern, least in program.said.items()):
            wrong[driver] = f"exit code {process.returncode}, {counts}:{os.linesep}{output[-3000:]}"
    assert not wrong, "\n".join(f"== {driver}: {text}" for driver, text in wrong.items())
