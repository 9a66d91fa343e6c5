"""A network interface that cannot carry a run is named by ``everyrank.join()`` itself, under launchers not ours."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.hosts import Host
from cluster.running import Running
from conftest import RunCli, nightly

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]

JOINS = "import everyrank\nwith everyrank.join() as world:\n    print(f'rank {world.rank} has joined', flush=True)\n"
LAUNCHERS = {
    "python": (),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "mpirun": ("mpirun", "-np", "2", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"),
}


@pytest.mark.parametrize("launcher", ["python", *map(nightly, ("torchrun", "mpirun"))])
def test_on_one_machine(run_cli: RunCli, tmp_path: Path, launcher: str) -> None:
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("mpirun not installed (scripts/install_cluster_tools.sh installs it)")
    (tmp_path / "train.py").write_text(JOINS)
    program = {
        "python": (sys.executable,),
        "torchrun": (sys.executable, *LAUNCHERS["torchrun"], f"--log-dir={tmp_path / 'logs'}"),
        "mpirun": (*LAUNCHERS["mpirun"], sys.executable),
    }[launcher]
    done = run_cli("train.py", program=program, env={"GLOO_SOCKET_IFNAME": "lo0"})
    assert done.returncode == (1 if launcher == "torchrun" else 2), done.stderr
    assert "GLOO_SOCKET_IFNAME=lo0 was set on" in done.stderr
    assert "there is no interface lo0 there, but" in done.stderr
    assert "Did you mean 'lo'? Fix: unset it (then lo is used, as all ranks are on this machine)" in done.stderr
    assert "train.py" not in done.stderr.replace("train.py FAILED", ""), "a traceback of the user's script"
    assert "joined" not in done.stdout


@pytest.fixture
def bare_interface(hosts: list[Host]) -> Iterator[str]:
    """An interface of node2 that has no address."""
    hosts[2].must("ip", "link", "add", "bare0", "type", "bridge")
    yield "bare0"
    hosts[2].must("ip", "link", "del", "bare0")


@pytest.mark.nightly  # by day nodes of torchrun: test_static_nodes.py
@pytest.mark.parametrize("interfaces", [("eth1",), ("lo", "bare0")])
def test_tasks_of_srun_on_two_nodes(
    start_on: Start, slurm: dict[str, str], bare_interface: str, interfaces: tuple[str, ...]
) -> None:
    """Set on node2 only, told by both tasks at once, which end with exit code 2."""
    found = {
        "eth1": "there is no interface eth1 there, but lo, eth0. Did you mean 'eth0'?",
        "lo": "the loopback leads to no other node.",
        bare_interface: "the interface bare0 has no address there; lo, eth0 have.",
    }
    steps = {}
    for interface in interfaces:
        only_there = f'[ "$SLURM_NODEID" = 1 ] && export GLOO_SOCKET_IFNAME={interface}; exec "$0" -c "$1"'
        task = ("bash", "-c", only_there, sys.executable, JOINS)
        steps[interface] = start_on(0, "-N2", "-n2", *task, program=("srun",), env=slurm)
    for interface, tasks in steps.items():
        assert tasks.wait() == 2, tasks.output
        assert f"GLOO_SOCKET_IFNAME={interface} was set on node2, but {found[interface]}" in tasks.output
        assert "Fix: unset it (then eth0 is used, which leads to node1)" in tasks.output
        assert "Traceback" not in tasks.output
        assert "joined" not in tasks.output
