"""An old script, mended by ``everyrank check --fix``, starts under the launchers of clusters as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.hosts import ROOT
from cluster.running import Running
from everyrank.cli.main import main

pytestmark = [pytest.mark.cluster, pytest.mark.nightly]
QUIET_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def test_an_old_script_after_fix_runs_by_mpi_slurm_and_ray(
    start_on: Callable[..., Running], slurm: dict[str, str], tmp_path: Path
) -> None:
    program = shutil.copy(ROOT / "tests" / "lint" / "programs" / "old_style.py", tmp_path / "train.py")
    assert main(["check", "--fix", "--unsafe", str(program)]) == 0
    drivers: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "mpi": (("-n2",), {}),
        "slurm": (("driver.nodes=2", "driver.poll_s=0.2", "-n1"), slurm),
        "ray": (("-n2",), QUIET_RAY),
    }
    if shutil.which("mpirun") is None:
        del drivers["mpi"]
    for driver, (options, env) in drivers.items():
        launch = start_on(0, f"driver={driver}", *options, "--", "train.py", env=env)
        assert launch.wait(200) == 0, launch.output
        written = tmp_path / "result.json"
        result = json.loads(written.read_text())
        written.unlink()
        assert (result["world_size"], result["local_rank"]) == (2, 0), driver
        first, second = result["orders"]
        assert len(set(first)) == 16
        assert first != second
