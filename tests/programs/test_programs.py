"""Programs that nobody here wrote, unchanged, under every launcher of this machine."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from conftest import RunCli, nightly
from programs.others import programs

DRIVERS = ("torchrun", "spawn", "launch", *(("mpi",) if shutil.which("mpirun") else ()))
RAY = (("accelerate_sync", "ray"),) if importlib.util.find_spec("ray") else ()
# By day every program but one (of accelerate's two the shorter), and one spawned; a plain script under every launcher:
# tests/cluster/test_scripts.py.
BY_DAY = {*((name, "torchrun") for name in programs().keys() - {"accelerate_script"}), ("launcher", "spawn")}
PAIRS = [
    pair if pair in BY_DAY else nightly(*pair)
    for pair in (*((name, driver) for name in sorted(programs()) for driver in DRIVERS), *RAY)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "driver"), PAIRS)
def test_a_program_of_others_does_its_work_under_every_launcher(run_cli: RunCli, name: str, driver: str) -> None:
    program = programs()[name]
    order = ("-n2", *program.settings, f"driver={driver}", "--", str(program.script))
    done = run_cli(*order, env={**program.env, "CUDA_VISIBLE_DEVICES": ""}, timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert program.missing(done.stdout + done.stderr) == {}, done.stdout + done.stderr
