"""Three seconds after a launching process is killed nothing of its run is left, whoever started it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import wait_for, wait_gone
from warm_start import Started

from conftest import nightly

STUCK = ("app=custom", "app._target_=probe_apps.StuckWithChildren", "+app.folder=told")


@pytest.mark.parametrize(
    "driver",
    [
        ("driver=torchrun",),
        nightly(("driver=torchrun", "driver.start_method=spawn")),
        ("driver=spawn",),
        ("driver=launch",),
        ("driver=mpi",),
    ],
    ids=" ".join,
)
def test_nothing_of_a_run_outlives_its_launcher(
    start_cli: Callable[..., Started], tmp_path: Path, driver: tuple[str, ...]
) -> None:
    if driver == ("driver=mpi",) and shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun here")
    process = start_cli(*driver, *STUCK, env={"TMPDIR": str(tmp_path)})  # a killed mpirun leaves its folder there
    for rank in (0, 1):
        wait_for(tmp_path / "told" / f"stuck-{rank}")
    pids = [int(path.name.rpartition("-")[2]) for path in (tmp_path / "told").glob("pid-*")]
    assert len(pids) == 8, "for each rank: itself, a loader worker, a child with its output, one in another session"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)  # nobody holds the pipe any more
    assert wait_gone(pids, timeout_s=8) == []


def test_a_rank_that_ends_takes_its_children_along(start_cli: Callable[..., Started], tmp_path: Path) -> None:
    process = start_cli("driver=torchrun", *STUCK)
    for rank in (0, 1):
        wait_for(tmp_path / "told" / f"stuck-{rank}")
    pids = [int(path.name.rpartition("-")[2]) for path in (tmp_path / "told").glob("pid-*")]
    [killed] = [int(path.name.rpartition("-")[2]) for path in (tmp_path / "told").glob("pid-rank-1-*")]
    os.kill(killed, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert wait_gone(pids, timeout_s=3) == []
