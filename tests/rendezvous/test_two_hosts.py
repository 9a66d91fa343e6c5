"""Two hosts, as two network namespaces joined by a cable: the interface is found without any variable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator

import pytest

pytestmark = pytest.mark.cluster

PROGRAM = """
import json, os, sys
import torch
import everyrank

try:
    with everyrank.join(timeout_s=float(os.environ["TIMEOUT_S"])) as world:
        total = int(everyrank.reduce_sum(torch.tensor(world.rank)))
        everyrank.monitored_barrier(30)
        seen = [world.num_nodes, world.local_rank, total, os.environ["GLOO_SOCKET_IFNAME"]]
except everyrank.EveryrankError as error:
    seen = [type(error).__name__, str(error)]
print(json.dumps(seen))
"""

Start = Callable[..., subprocess.Popen[str]]


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces; host n has address 10.77.1.n on interface cable-n."""
    tag = uuid.uuid4().hex[:6]
    names = [f"er-{tag}-{n}" for n in (1, 2)]
    if shutil.which("ip") is None or not all(_ip("netns", "add", name) for name in names):
        pytest.skip("network namespaces need root and iproute2")
    try:
        one, two = names
        assert _ip("link", "add", "cable-1", "netns", one, "type", "veth", "peer", "name", "cable-2", "netns", two)
        for n, name in enumerate(names, start=1):
            assert _ip("-n", name, "addr", "add", f"10.77.1.{n}/24", "dev", f"cable-{n}")
            assert _ip("-n", name, "link", "set", "lo", "up")
            assert _ip("-n", name, "link", "set", f"cable-{n}", "up")
        yield names
    finally:
        for name in names:
            _ip("netns", "del", name)


@pytest.fixture
def start(hosts: list[str]) -> Iterator[Start]:
    """Start the program as the one rank of host ``rank``."""
    started: list[subprocess.Popen[str]] = []

    def begin(rank: int, master_addr: str, timeout_s: float) -> subprocess.Popen[str]:
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": master_addr, "MASTER_PORT": "29500", "TIMEOUT_S": str(timeout_s)}
        command = ["ip", "netns", "exec", hosts[rank], sys.executable, "-c", PROGRAM]
        process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.nightly  # by day tests/cluster/test_scripts.py asks it of the ranks of nodes
def test_the_route_to_the_master_picks_the_interface(start: Start) -> None:
    ranks = [start(rank, "10.77.1.1", 60) for rank in range(2)]
    seen = [json.loads(rank.communicate(timeout=90)[0]) for rank in ranks]
    assert seen == [[2, 0, 1, "cable-1"], [2, 0, 1, "cable-2"]]


def test_a_master_that_is_not_there_is_named_at_the_timeout(start: Start) -> None:
    kind, message = json.loads(start(1, "10.77.1.99", 2).communicate(timeout=60)[0])
    assert kind == "RendezvousError"
    assert "could not reach the master at 10.77.1.99:29500 within 2 s (" in message
