"""Ray, started for real: a cluster of two hosts that runs already, and one of the run's own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.hosts import Host
from cluster.running import PATIENCE_S, Running, wait_for
from conftest import RunCli

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray not installed (pip install 'everyrank[ray]')"
    ),
]
Start = Callable[..., Running]
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # else Ray writes a token into the home folder
FAST_END = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}


@pytest.fixture(scope="module")
def cluster(hosts: list[Host]) -> Iterator[str]:
    """Address of a Ray cluster of node0 and node1, with one core each."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/var/tmp"))  # a short path: a socket's name has an end
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EVERYRANK_")} | QUIET | FAST_END
    nodes: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"{host.name}.out" for host in hosts[:2]]

    def start(node: int, *more: str) -> None:
        with logs[node].open("w") as log:
            command = [*ray, f"--node-ip-address={hosts[node].address}", *more]
            nodes.append(subprocess.Popen(hosts[node].command(command), env=clean, stdout=log, stderr=log))

        def explain() -> str:
            return f"Ray did not start on node{node}:\n{logs[node].read_text()}"

        wait_for(lambda: "Ray runtime started" in logs[node].read_text(), PATIENCE_S, explain)

    try:
        start(0, "--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}/head")
        start(1, "--address=10.77.0.1:6379", f"--temp-dir={folder}/other")
        yield "node0:6379"
    finally:
        for node in reversed(nodes):  # one after the other: a node that leaves says goodbye to the head
            node.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(40)
            node.kill()
            node.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_ranks_of_one_host_stand_together_and_see_its_gpus() -> None:
    from everyrank.drivers.ray_ranks import Place, variables_of

    b, a = "10.0.0.2", "10.0.0.1"
    places = [Place("b", b, 5000, ["3"]), Place("b", b, 5001, ["1"]), Place("a", a, 5002, ["0"])]
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "CUDA_VISIBLE_DEVICES")
    found = variables_of(places)
    assert [[one[name] for name in names] for one in found] == [
        ["0", "0", "2", "0", "3,1"],
        ["1", "1", "2", "0", "3,1"],
        ["2", "0", "1", "1", "0"],
    ]
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in found} == {("3", "10.0.0.2", "5000")}


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:{closed}", "connection refused: the host is up, but nothing listens on that port"),
        ("no-such-host.invalid:6379", "the name no-such-host.invalid does not resolve here"),
        ("auto", "Could not find any running Ray instance"),
        ("ray://127.0.0.1:10001", "it is auto or HOST:PORT"),
        ("node0", "it is auto or HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_named_at_once(run_cli: RunCli, address: str, found: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = address.format(closed=closed.getsockname()[1])
        done = run_cli("driver=ray", f"driver.address={address}", "app=hello_dist", timeout_s=60, env=QUIET)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: driver.address={address} was set" in done.stderr
    assert found in done.stderr
    assert "Set the address that `ray start --head` printed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.nightly
def test_another_program_at_the_address_is_told_of_after_a_while(run_cli: RunCli) -> None:
    """Where Ray itself would wait without end."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        done = run_cli("driver=ray", f"driver.address={address}", "app=hello_dist", timeout_s=100, env=QUIET)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: driver.address={address} was set, but whatever listens there has not answered" in done.stderr


@pytest.mark.nightly
def test_a_cluster_runs_an_app_on_two_hosts(start_on: Start, cluster: str) -> None:
    launch = start_on(0, "driver=ray", f"driver.address={cluster}", "app=hello_dist", env=QUIET)
    assert launch.wait() == 0, launch.output
    assert "[Rank 0] Sum of all ranks: 1" in launch.output
    assert "launcher ray by" in launch.output
    assert "network interface: eth0" in launch.output, "the two ranks are on one host"


@pytest.mark.nightly
def test_ranks_that_wait_for_a_place_say_so_and_can_be_called_off(start_on: Start, cluster: str) -> None:
    launch = start_on(0, "driver=ray", f"driver.address={cluster}", "driver.num_workers=3", "app=hello_dist", env=QUIET)
    said = "notice: waiting for 3 times 1 CPU; there is CPU 2, GPU 0 in all"
    wait_for(lambda: said in launch.output, PATIENCE_S, lambda: launch.output)
    launch.process.send_signal(signal.SIGINT)
    assert launch.wait() == 130, launch.output
    assert "Traceback" not in launch.output


@pytest.mark.slow
def test_a_ray_of_its_own_listens_on_loopback_only_and_names_the_guilty_rank_of_each_attempt(
    start_on: Start, hosts: list[Host], tmp_path: Path
) -> None:
    """Beside what listens on that host already. What a rank prints last, Ray may not show: its log has it."""
    sockets = hosts[2].must("cat", "/proc/net/tcp", "/proc/net/tcp6").splitlines()
    before = ",".join(f"'{line.split()[1]}'" for line in sockets if line.split()[3] == "0A")
    app = ("app=custom", "app._target_=elastic_apps.Listeners", "+app.guilty=1", f"+app.before=[{before}]")
    launch = start_on(2, "driver=ray", "driver.num_workers=2", "driver.max_failures=1", *app, env=QUIET)
    assert launch.wait() == 1, launch.output
    assert "notice: rank 1 failed: killed by SIGKILL" in launch.output
    assert "all ranks start again (restart 1)" in launch.output
    (log,) = tmp_path.glob("outputs/*/logs/rank-0.log")
    said = log.read_text()
    assert "somebody listens on 127.0.0.1\n" in said
    assert f"sum 1, niceness {os.nice(0)}\n" in said, "ranks give way to all other processes"
    assert "error: rank 1 of 2 failed: LookupError: the sample 1 is missing" in launch.output


@pytest.mark.nightly
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_which_stop(start_on: Start, tmp_path: Path, signum: signal.Signals) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    app = ("app=custom", "app._target_=elastic_apps.Loops", f"+app.folder={folder}")
    launch = start_on(2, "driver=ray", "driver.num_workers=2", *app, env=QUIET)
    wait_for(lambda: (folder / "world-0-2").exists(), PATIENCE_S, lambda: launch.output)
    launch.process.send_signal(signum)
    assert launch.wait() == 75, launch.output
    assert f"told to stop by {signum.name}" in launch.output


@pytest.mark.nightly
def test_the_ranks_end_with_a_launcher_that_is_killed(start_on: Start, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    app = ("app=custom", "app._target_=elastic_apps.Loops", f"+app.folder={folder}")
    launch = start_on(2, "driver=ray", "driver.num_workers=2", *app, env=QUIET)
    wait_for(lambda: len(list(folder.glob("pid-*"))) == 2, PATIENCE_S, lambda: launch.output)
    ranks = [int(file.read_text()) for file in folder.glob("pid-*")]
    launch.process.kill()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in ranks), PATIENCE_S, lambda: launch.output)


@pytest.mark.nightly
def test_more_gpus_than_there_are_is_one_message(start_on: Start) -> None:
    launch = start_on(2, "driver=ray", "driver.use_gpu=true", "app=hello_dist", env=QUIET)
    assert launch.wait() == 2, launch.output
    assert "error: driver.use_gpu=true and driver.num_workers=2 were set, but Ray finds 0 GPUs" in launch.output
    assert "Traceback" not in launch.output
