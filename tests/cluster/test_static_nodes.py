"""Two hosts with ``driver.node_rank=0`` and ``driver.node_rank=1``: the commands of the cluster guide, and mistakes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.hosts import Host
from cluster.running import Running
from conftest import nightly

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]
HELLO = ("driver=torchrun", "app=hello_dist", "driver.nnodes=2", "driver.master_port=29500")


@pytest.mark.parametrize(("nproc", "master"), [((8, 8), "node0"), ((1, 3), "10.77.0.1")])
def test_two_nodes_meet_and_the_interface_is_found(start_on: Start, nproc: tuple[int, int], master: str) -> None:
    """Also with different numbers of processes: ranks are laid out by node."""
    nodes = [
        start_on(
            rank,
            *HELLO,
            f"driver.nproc_per_node={nproc[rank]}",
            f"driver.node_rank={rank}",
            f"driver.master_addr={master}",
            "run.log_level=INFO",
        )
        for rank in (0, 1)
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    size = sum(nproc)
    ranks = [range(nproc[0]), range(nproc[0], size)]
    for node, expected in zip(nodes, ranks, strict=True):
        for local_rank, rank in enumerate(expected):
            assert f"[Rank {rank}/{size}] Local rank: {local_rank}" in node.output
        assert "network interface: eth0" in node.output
    assert f"[Rank 0] Sum of all ranks: {size * (size - 1) // 2}" in nodes[0].output


def test_ranks_of_two_nodes_run_an_outside_program(start_on: Start, tmp_path: Path) -> None:
    """A plain script of torch's, which knows nothing of everyrank, meets across hosts without any variable."""
    (tmp_path / "plain.py").write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.ones(1)\n"
        "dist.all_reduce(total)\n"
        "print(f'rank {dist.get_rank()} of {dist.get_world_size()} counts {int(total)}', flush=True)\n"
        "print('gloo goes by', os.environ['GLOO_SOCKET_IFNAME'], flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    settings = ("app=custom", "app._target_=elastic_apps.Script", f"+app.script={tmp_path / 'plain.py'}")
    nodes = [
        start_on(
            rank,
            *("driver=torchrun", *settings, "driver.nproc_per_node=2", "driver.nnodes=2"),
            *(f"driver.node_rank={rank}", "driver.master_addr=node0", "driver.master_port=29500"),
        )
        for rank in (0, 1)
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    for rank in range(4):
        assert f"rank {rank} of 4 counts 4" in nodes[rank // 2].output
    assert "gloo goes by eth0" in nodes[1].output


def test_a_master_that_is_not_there_is_named(start_on: Start, hosts: list[Host]) -> None:
    """Refused, dropped by a firewall, unknown: the address, the port and what was seen."""
    hosts[0].drop(29511)
    cases = {
        "node0:29500": ("node0", 29500, "connection refused"),
        "node0:29511": ("node0", 29511, "a firewall drops the packets"),
        "nowhere:29500": ("nowhere", 29500, "the name nowhere does not resolve"),
    }
    running = {
        endpoint: start_on(
            1,
            *("driver=torchrun", "app=hello_dist", "driver.nnodes=2", "driver.node_rank=1"),
            *(f"driver.master_addr={host}", f"driver.master_port={port}", "driver.rdzv_timeout_s=2"),
            f"run.name={host}-{port}",
        )
        for endpoint, (host, port, _) in cases.items()
    }
    for endpoint, (_, _, found) in cases.items():
        node = running[endpoint]
        assert node.wait() == 2, node.output
        assert f"node 0 could not be reached at {endpoint} within 2 s" in node.output
        assert found in node.output
        assert "Traceback" not in node.output


@pytest.mark.parametrize("closed", [0, 1])
def test_a_firewall_that_lets_only_the_masters_port_through_is_told_by_all_ranks(
    start_on: Start, hosts: list[Host], closed: int
) -> None:
    """At once, where gloo would wait five times the ten minutes of the timeout."""
    hosts[closed].must(
        "nft",
        "table inet cut {\nchain in {\ntype filter hook input priority 0\niif lo accept\ntcp dport 29500 accept\n"
        "tcp flags & (syn | ack) == syn drop\n}\n}\n",
    )
    nodes = [
        start_on(rank, *HELLO, "driver.nproc_per_node=2", f"driver.node_rank={rank}", "driver.master_addr=node0")
        for rank in (0, 1)
    ]
    for node in nodes:
        assert node.wait() == 2, node.output
        assert f"on node{1 - closed}) cannot reach rank {2 * closed} (pid" in node.output
        assert f"at 10.77.0.{closed + 1}:" in node.output
        assert "(no answer: the host is down, or a firewall drops the packets)" in node.output
        assert "let TCP through between the nodes on all ports" in node.output
        assert "Traceback" not in node.output


def test_a_node_that_does_not_come_is_named(start_on: Start) -> None:
    node = start_on(0, *HELLO, "driver.node_rank=0", "driver.master_addr=node0", "driver.rdzv_timeout_s=1")
    assert node.wait() == 2
    assert "node 1 of 2 did not come to node0:29500 within 1 s" in node.output


@pytest.mark.parametrize(
    ("interface", "found"), [("nope0", "there is no interface nope0"), ("lo", "leads to no other node")]
)
def test_a_wrong_interface_is_named_on_both_nodes(start_on: Start, interface: str, found: str) -> None:
    first = start_on(0, *HELLO, "driver.node_rank=0", "driver.master_addr=node0")
    first.until_says("rendezvous static")
    wrong = {"GLOO_SOCKET_IFNAME": interface}
    second = start_on(1, *HELLO, "driver.node_rank=1", "driver.master_addr=node0", env=wrong)
    for node in (first, second):
        assert node.wait() == 2, node.output
        assert f"GLOO_SOCKET_IFNAME={interface} was set on node1, but" in node.output
        assert found in node.output
        assert "then eth0 is used, which leads to node0" in node.output


def test_a_rank_that_is_killed_restarts_the_group_on_all_nodes(start_on: Start) -> None:
    """At once, in one attempt that all agree on, in a store without addresses of the dead."""
    app = ("app=custom", "app._target_=probe_apps.KilledOnRank", "+app.guilty=2", "+app.attempts=2")
    nodes = [
        start_on(
            rank,
            *("driver=torchrun", *app, "driver.nproc_per_node=2", "driver.max_restarts=2", "driver.nnodes=2"),
            *(f"driver.node_rank={rank}", "driver.master_addr=node0", "driver.master_port=29500"),
        )
        for rank in (0, 1)
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    for rank in range(4):
        assert f"rank {rank} went on in attempt 2" in nodes[rank // 2].output


def test_a_busy_port_is_named(start_on: Start, hosts: list[Host], tmp_path: Path) -> None:
    code = "import socket; s = socket.create_server(('', 29500)); print('listens', flush=True); s.accept(); input()"
    other = Running(hosts[0].start([sys.executable, "-c", code], tmp_path), "the other program")
    other.until_says("listens")
    node = start_on(0, *HELLO, "driver.node_rank=0", "driver.master_addr=node0")
    assert node.wait() == 2
    assert "port 29500 of this machine is in use by another process" in node.output
    other.process.kill()
    other.wait()


@pytest.mark.parametrize(
    ("settings", "pretend", "named"),
    [
        nightly(("driver.nnodes=3",), "", ("has driver.nnodes 2,", "but node node1 has 3.")),
        ((), "import everyrank; everyrank.__version__ = '0.0.7'", ("has everyrank 0.", "but node node1 has 0.0.7.")),
        nightly((), "import torch; torch.__version__ = '2.6.0'", ("has torch 2.", "but node node1 has 2.6.0.")),
    ],
    ids=["nnodes", "everyrank", "torch"],
)
def test_nodes_that_do_not_fit_are_told_on_both(
    start_on: Start, tmp_path: Path, settings: tuple[str, ...], pretend: str, named: tuple[str, str]
) -> None:
    """Different settings, or different versions of torch or everyrank: at once, with both nodes and both values."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text(pretend)
    first = start_on(0, *HELLO, "driver.node_rank=0", "driver.master_addr=node0")
    first.until_says("rendezvous static")
    second = start_on(
        1,
        *(*HELLO, "driver.master_addr=node0", "driver.node_rank=1", *settings),
        env={"PYTHONPATH": str(tmp_path / "other")},
    )
    for node in (first, second):
        assert node.wait() == 2, node.output
        for text in ("node node0, which came first,", *named):
            assert text in node.output
