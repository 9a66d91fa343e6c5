"""A plain script under every driver: told what torchrun promises, it meets the others and listens where it should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.hosts import Host
from cluster.running import Running
from conftest import RunCli, cli_environment, nightly
from programs.others import programs

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]
SCRIPT = Path(__file__).parent / "programs" / "contract.py"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
QUIET_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun not installed")


@dataclass(frozen=True)
class Told:
    """What one rank wrote down."""

    rank: int
    variables: dict[str, str]
    said: dict[str, Any]

    def number(self, name: str) -> int:
        """A variable that holds a number."""
        return int(self.variables[name])


@pytest.fixture(scope="module")
def promised(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The variables by which the installed torchrun tells a rank its place."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--log-dir={folder}", "--no-python"]
    told = subprocess.run([*command, "env", "-0"], env=cli_environment(), cwd=folder, check=True, capture_output=True)
    own = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    names = {line.partition("=")[0] for line in told.stdout.decode().split("\0")}
    names = {name for name in names if name.startswith(own) and name not in os.environ}
    assert "TORCHELASTIC_RUN_ID" in names
    return names - {"TORCHELASTIC_SIGNALS_TO_HANDLE"}  # what torchrun tells itself


def told_to(folder: Path, size: int, promised: Set[str] = frozenset()) -> list[Told]:
    """What the ranks wrote down, once all have found their place and done their work."""
    found = []
    for rank in range(size):
        said = json.loads((folder / f"contract-{rank}.json").read_text())
        found.append(Told(rank, said.pop("variables"), said))
    for told in found:
        assert promised <= told.variables.keys()
        assert told.number("RANK") == told.rank
        assert told.number("WORLD_SIZE") == told.said["size"] == size
        assert told.said["total"] == size * (size + 1) / 2
        assert told.said["gradient"] == found[0].said["gradient"]
        assert told.variables["MASTER_ADDR"] == found[0].variables["MASTER_ADDR"]
        assert told.variables["MASTER_PORT"] == found[0].variables["MASTER_PORT"]
        here = [other for other in found if other.said["host"] == told.said["host"]]
        assert told.number("LOCAL_WORLD_SIZE") == len(here)
        assert [other.number("LOCAL_RANK") for other in here] == list(range(len(here)))
        assert {other.number("GROUP_RANK") for other in here} == {told.number("GROUP_RANK")}
        assert told.number("GROUP_RANK") * len(here) + told.number("LOCAL_RANK") == told.rank
    return found


ON_ONE_MACHINE = {
    "torchrun": ("driver=torchrun",),
    "torchrun-spawn": ("driver=torchrun", "driver.start_method=spawn"),
    "torchrun-fork": ("driver=torchrun", "driver.start_method=fork"),
    "spawn": ("driver=spawn",),
    "launch": ("driver=launch",),
    "launch-argument": ("driver=launch", "driver.use_env=false"),
    "mpi": ("driver=mpi",),
    "ray": ("driver=ray",),
}


@pytest.mark.parametrize(
    "name",
    [
        "launch-argument",
        # By day under torchrun and mpi on hosts, below; spawned: tests/program/test_running.py.
        *map(nightly, ("spawn", "torchrun", "torchrun-spawn", "torchrun-fork", "launch", "ray")),
        pytest.param("mpi", marks=[needs_mpi, pytest.mark.nightly]),
    ],
)
def test_a_script_is_told_its_place_on_one_machine(
    run_cli: RunCli, tmp_path: Path, promised: set[str], name: str
) -> None:
    """And nothing of the run listens beyond loopback."""
    arguments = ("--lr=0.1", "a=b", "+x=1", "-h", "--multirun", "--", "", "größer ${x}")
    order = (*ON_ONE_MACHINE[name], "-n", "2", "--", str(SCRIPT), *arguments, str(tmp_path))
    done = run_cli(*order, env=QUIET_RAY, timeout_s=240)  # Ray takes its time
    assert done.returncode == 0, done.stdout + done.stderr
    for told in told_to(tmp_path, 2, promised):
        assert told.variables["MASTER_ADDR"] == "127.0.0.1"
        assert told.said["listening"], "gloo listens: a test that sees no socket sees nothing"
        assert set(told.said["listening"]) <= LOOPBACK
        if not name.startswith("launch"):  # torch's own launcher, which says none
            assert told.variables["TORCHELASTIC_RUN_ID"] not in ("", "everyrank"), "no two runs have the same"
        argument = [f"--local-rank={told.rank}"] if name == "launch-argument" else []
        assert told.said["argv"] == [*argument, *arguments, str(tmp_path)]
        log = next(tmp_path.glob(f"outputs/contract-*/logs/rank-{told.rank}.log")).read_text()
        assert f"rank {told.rank} of 2: total 3.0\n" in log
        if name != "ray":  # which shows what its workers print in its own way
            assert done.stdout.count(f"rank {told.rank} of 2: total 3.0\n") == 1


def _meets_at_node0(told: list[Told]) -> None:
    assert told[0].variables["MASTER_ADDR"] in ("node0", "node1", "10.77.0.1", "10.77.0.2")
    assert {one.variables["GLOO_SOCKET_IFNAME"] for one in told} == {"eth0"}
    assert len({one.said["host"] for one in told}) == 2


BOTH_START = {
    "static": ("driver=torchrun", "driver.nnodes=2", "driver.master_addr=node0", "driver.master_port=29500"),
    "launch": ("driver=launch", "driver.nnodes=2", "driver.master_addr=node0", "driver.master_port=29500"),
    "elastic": ("driver=torchrun", "driver.min_nodes=2", "driver.max_nodes=3", "driver.rdzv_endpoint=node0:29500"),
}


@pytest.mark.parametrize("name", ["static", "elastic", nightly("launch")])
def test_a_script_is_told_its_place_on_nodes_that_are_started_one_by_one(
    start_on: Start, tmp_path: Path, promised: set[str], name: str
) -> None:
    nodes = []
    for rank in (0, 1):
        number = () if name == "elastic" else (f"driver.node_rank={rank}",)
        nodes.append(start_on(rank, *BOTH_START[name], *number, "-n2", "--", str(SCRIPT), str(tmp_path)))
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    told = told_to(tmp_path, 4, promised)
    _meets_at_node0(told)
    for one in told:
        assert f"rank {one.rank} of 4: total 10.0" in nodes[int(one.said["host"] == "node1")].output


@pytest.mark.parametrize(("task_per", "per_node"), [("rank", 1), *(nightly(what, 2) for what in ("node", "rank"))])
def test_a_script_is_told_its_place_in_a_job_of_slurms(
    start_on: Start, slurm: dict[str, str], tmp_path: Path, promised: set[str], task_per: str, per_node: int
) -> None:
    order = ("driver=slurm", "driver.nodes=2", f"driver.task_per={task_per}", "driver.poll_s=0.2", f"-n{per_node}")
    launch = start_on(0, *order, "--", str(SCRIPT), str(tmp_path), env=slurm)
    assert launch.wait() == 0, launch.output
    size = 2 * per_node
    told = told_to(tmp_path, size, promised)
    _meets_at_node0(told)
    assert launch.output.count(f"rank 0 of {size}: total {size * (size + 1) / 2}") == 1


@pytest.mark.nightly
def test_a_program_of_others_does_its_work_in_a_job_of_slurms(start_on: Start, slurm: dict[str, str]) -> None:
    program = programs()["accelerate_sync"]
    order = ("driver=slurm", "driver.nodes=2", "driver.poll_s=0.2", "-n1", "--", str(program.script))
    launch = start_on(0, *order, env=slurm | program.env)
    assert launch.wait() == 0, launch.output
    assert program.missing(launch.output) == {}, launch.output


@pytest.mark.parametrize(("driver", "per_node"), [("torchrun", 2), pytest.param("mpi", 1, marks=needs_mpi)])
def test_a_script_is_told_its_place_on_hosts(
    start_on: Start, ssh_config: str, tmp_path: Path, promised: set[str], driver: str, per_node: int
) -> None:
    option = f"driver.ssh_args=[-F,{ssh_config}]"
    if driver == "mpi":
        option = f"driver.mpi_args=[--mca,plm_rsh_args,'-F {ssh_config}']"
    order = (f"driver={driver}", "driver.hosts=[node0,node1]", option, f"-n{per_node}")
    launch = start_on(0, *order, "--", str(SCRIPT), "", "a b", str(tmp_path))
    assert launch.wait() == 0, launch.output
    size = 2 * per_node
    told = told_to(tmp_path, size, promised)
    _meets_at_node0(told)
    for one in told:
        assert one.said["argv"] == ["", "a b", str(tmp_path)]
        assert launch.output.count(f"rank {one.rank} of {size}: total {size * (size + 1) / 2}") == 1


def test_a_script_is_told_its_place_in_the_pods_of_a_manifest(
    start_on: Start, hosts: list[Host], tmp_path: Path, promised: set[str]
) -> None:
    """The pods' own commands, on two hosts, with what the operator tells each pod; only the mount is elsewhere."""
    order = ("driver=kubernetes", "driver.image=mine:1", "driver.nodes=2", "driver.volume_claim=runs")
    written = start_on(0, *order, f"driver.python={sys.executable}", "-n2", "--", str(SCRIPT), str(tmp_path))
    assert written.wait() == 0, written.output
    (manifest,) = tmp_path.glob("outputs/contract-*/contract-*.yaml")
    config_map, job = yaml.safe_load_all(manifest.read_text())
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    (mounted / "run.yaml").write_text(config_map["data"]["run.yaml"])
    hosts[0].must("sh", "-c", f"echo {hosts[0].address} {job['metadata']['name']}-master-0 >> /etc/hosts")
    pods = []
    for index, role in enumerate(("Master", "Worker")):
        (container,) = job["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]["containers"]
        variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        operator = {"MASTER_ADDR": "localhost" if index == 0 else f"{job['metadata']['name']}-master-0"}
        operator |= {"MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": str(index), "REPLICA_INDEX": "0"}
        operator["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
        command = [word.replace("/etc/everyrank", str(mounted)) for word in container["command"]]
        pods.append(start_on(index, program=tuple(command), env=variables | operator))
    assert [pod.wait() for pod in pods] == [0, 0], pods[0].output + pods[1].output
    told = told_to(tmp_path, 4, promised)
    assert {one.said["host"] for one in told[:2]} == {"node0"}
