"""Fixtures of the tests that need more than one process tree: hosts, and the launchers of clusters."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import hosts as lab
from cluster import slurm_cluster, ssh_servers
from cluster.running import Running

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[lab.Host]]:
    """Three hosts on one network."""
    why_not = lab.missing()
    if why_not:
        pytest.skip(why_not)
    with lab.network(3, tmp_path_factory.mktemp("network")) as made:
        yield made


@pytest.fixture(scope="session")
def slurm(hosts: list[lab.Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables under which Slurm's commands, on node0, find a cluster of node1 and node2."""
    why_not = slurm_cluster.missing()
    if why_not:
        pytest.skip(why_not)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))  # a short path: a socket's name has an end
    with slurm_cluster.slurm(hosts, folder) as env:
        yield env
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ssh_config(hosts: list[lab.Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A configuration for ssh that may log in to node0 and node1."""
    why_not = ssh_servers.missing()
    if why_not:
        pytest.skip(why_not)
    with ssh_servers.servers(hosts[:2], tmp_path_factory.mktemp("ssh")) as config:
        yield str(config)


@pytest.fixture
def start_on(hosts: list[lab.Host], tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """``start_on(node, *args)``: start ``python run.py ARGS`` on a host, in a folder that all hosts share."""
    started: list[Running] = []

    def start(node: int, *args: str, program: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Running:
        command = [*(program or (sys.executable, str(lab.ROOT / "run.py"))), *args]
        paths = os.pathsep.join([str(lab.ROOT / "tests" / "support"), str(TESTS)])
        process = hosts[node].start(command, tmp_path, {"PYTHONPATH": paths, **(env or {})})
        started.append(Running(process, f"node{node}"))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.wait()
    for host in hosts:
        host.mend()
