"""``rehearse=cpu``: the key that makes any driver's ranks rehearse."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import RunCli, nightly

APP = ("app=hello_dist", "app._target_=probe_apps.Rehearsed")


@pytest.mark.parametrize(
    "driver",
    ["local", *map(nightly, ("torchrun", "spawn"))],  # by day under torchrun: test_rehearsal.py
)
def test_ranks_join_as_on_gpus(run_cli: RunCli, driver: str) -> None:
    ranks = 1 if driver == "local" else 2
    order = () if driver == "local" else ("driver.nproc_per_node=2",)
    done = run_cli(f"driver={driver}", *order, *APP, "rehearse=cpu")
    assert done.returncode == 0, done.stderr
    backend = "nccl" if driver == "local" else "cpu:gloo,cuda:nccl"
    for rank in range(ranks):
        assert f"rank {rank} on cuda:{rank} of {ranks}, by {backend}; its child counts {ranks}" in done.stdout


def test_a_rehearsal_has_a_folder_of_its_own(run_cli: RunCli, tmp_path: Path) -> None:
    order = ("driver=mpi", "driver.dry_run=true", *APP)
    plans = [run_cli(*order, f"rehearse={value}").stdout for value in ("null", "cpu")]
    assert "variable: EVERYRANK_REHEARSE=cpu" in plans[1]
    assert "EVERYRANK_REHEARSE" not in plans[0]
    assert "startup" in plans[1]
    assert "-rehearsed/run.yaml" in plans[1]
    assert "-rehearsed" not in plans[0]


def test_a_misspelt_kind_starts_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli(*APP, "rehearse=gpu")
    assert done.returncode == 2
    assert "rehearse: found 'gpu' (str), but it must be one of 'cpu'. Did you mean 'cpu'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()
