"""``driver.hosts=[node0,node1]``: every node from one command, and none of them outlives it."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.running import PATIENCE_S, Running, wait_for
from conftest import nightly

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]


@pytest.fixture
def login(ssh_config: str) -> str:
    """Settings that let ssh log in to the hosts."""
    return f"driver.ssh_args=[-F,{ssh_config}]"


@pytest.mark.nightly  # by day a script is started, see test_scripts.py
def test_one_command_starts_all_hosts(start_on: Start, login: str) -> None:
    launch = start_on(0, "driver=torchrun", "app=hello_dist", "driver.hosts=[node0,node1]", login)
    assert launch.wait() == 0, launch.output
    assert "[Rank 0] Sum of all ranks: 6" in launch.output
    for rank in range(4):
        assert f"[Rank {rank}/4] Local rank: {rank % 2}" in launch.output


def test_a_failure_names_the_rank_and_a_host_without_login_is_named(start_on: Start, login: str) -> None:
    app = ("app=custom", "app._target_=probe_apps.RaisesOnRank", "+app.guilty=1", "driver.nproc_per_node=1")
    failing = start_on(0, "driver=torchrun", *app, "driver.hosts=[node0,node1]", login)
    lost = start_on(
        0, "driver=torchrun", "app=hello_dist", "driver.hosts=[node0,node9]", "driver.master_port=29501", login
    )
    assert failing.wait() == 1, failing.output
    assert "LookupError: the sample 1 is missing" in failing.output
    assert failing.output.count("Traceback") == 1, failing.output
    assert lost.wait() == 2, lost.output
    assert "driver.hosts names node9, but ssh could not start anything there, or lost it" in lost.output


@pytest.mark.parametrize("signum", [nightly(signal.SIGINT), signal.SIGKILL])
def test_the_nodes_end_with_the_command(start_on: Start, login: str, tmp_path: Path, signum: int) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    launch = start_on(
        0,
        *("driver=torchrun", "app=custom", "app._target_=elastic_apps.Loops", f"+app.folder={folder}"),
        *("driver.hosts=[node0,node1]", "driver.nproc_per_node=1", login),
    )
    wait_for(lambda: (folder / "world-0-2").exists(), PATIENCE_S, lambda: launch.output)
    ranks = [psutil.Process(json.loads((folder / f"pid-node{i}-0").read_text())) for i in (0, 1)]
    launch.process.send_signal(signum)
    launch.wait()
    gone = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    wait_for(lambda: not any(r.is_running() and r.status() not in gone for r in ranks), 20, lambda: "ranks went on")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun not installed (scripts/install_cluster_tools.sh)")
@pytest.mark.nightly
def test_open_mpi_starts_ranks_on_all_hosts(start_on: Start, ssh_config: str) -> None:
    """``driver=mpi driver.hosts=[...]``: ranks by host, their master is found, and a failure names the rank."""
    hosts = ("driver=mpi", "driver.hosts=[node0,node1]", f"driver.mpi_args=[--mca,plm_rsh_args,'-F {ssh_config}']")
    launch = start_on(0, *hosts, "app=hello_dist", "driver.nproc_per_node=2", "run.log_level=INFO")
    assert launch.wait() == 0, launch.output
    assert "[Rank 0] Sum of all ranks: 6" in launch.output
    for rank in range(4):
        assert f"[Rank {rank}/4] Local rank: {rank % 2}" in launch.output
    assert "network interface: eth0" in launch.output
    app = ("app=custom", "app._target_=probe_apps.RaisesOnRank", "+app.guilty=1")
    failing = start_on(0, *hosts, *app, "driver.nproc_per_node=1")
    assert failing.wait() == 1, failing.output
    assert "error: rank 1 of 2 failed: LookupError: the sample 1 is missing" in failing.output
