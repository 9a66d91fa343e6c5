"""Nodes that come and go: late, killed, told to leave, cut off; and the end of the node that holds the store."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.hosts import Host
from cluster.running import PATIENCE_S, Running, wait_for

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]


class Job:
    """One elastic run: ``elastic_apps.Loops`` on up to three hosts."""

    def __init__(self, start_on: Start, folder: Path) -> None:
        self.folder = folder
        self.nodes: dict[int, Running] = {}
        self._start_on = start_on
        self._seen: set[str] = set()
        folder.mkdir()

    def start(self, node: int, *more: str) -> Running:
        self.nodes[node] = self._start_on(
            node,
            *("driver=torchrun", "app=custom", "app._target_=elastic_apps.Loops", f"+app.folder={self.folder}"),
            *("driver.nproc_per_node=1", "driver.rdzv_backend=c10d", "driver.rdzv_endpoint=node0:29500"),
            *("driver.rdzv_id=my_job", "driver.min_nodes=1", "driver.max_nodes=3", *more),
        )
        return self.nodes[node]

    def reaches(self, size: int) -> int:
        """Wait for a new world of ``size`` nodes; returns its number of steps so far."""
        found: list[Path] = []

        def new_world() -> bool:
            worlds = {path.name: path for path in self.folder.glob("world-*")}
            found[:] = [p for name, p in worlds.items() if name not in self._seen and name.endswith(f"-{size}")]
            if found:
                self._seen |= set(worlds)
            return bool(found)

        def explain() -> str:
            said = "\n".join(f"--- {node.name}\n{node.output}" for node in self.nodes.values())
            return (
                f"no new world of size {size}; there were {sorted(p.name for p in self.folder.glob('world-*'))}\n{said}"
            )

        wait_for(new_world, PATIENCE_S, explain)
        return int(json.loads(found[0].read_text()))

    def pid(self, node: int) -> int:
        return int(json.loads((self.folder / f"pid-node{node}-0").read_text()))

    def stop(self) -> None:
        (self.folder / "stop").touch()


@pytest.fixture
def job(start_on: Start, tmp_path: Path) -> Job:
    return Job(start_on, tmp_path / "job")


def test_nodes_join_late_are_killed_and_leave_and_training_goes_on(job: Job) -> None:
    job.start(0)
    job.start(1)
    steps = [job.reaches(2)]
    job.start(2)
    steps.append(job.reaches(3))

    rank = psutil.Process(job.pid(2))
    job.nodes[2].process.send_signal(signal.SIGKILL)
    wait_for(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE, 5, lambda: "a rank was orphaned")
    steps.append(job.reaches(2))

    job.nodes[1].process.send_signal(signal.SIGTERM)
    assert job.nodes[1].wait() == 75, job.nodes[1].output
    assert "preempted: a checkpoint is saved" in job.nodes[1].output
    steps.append(job.reaches(1))

    job.stop()
    assert job.nodes[0].wait() == 0, job.nodes[0].output
    assert steps == sorted(set(steps)), "a world began before the end of the one before it"


def test_a_cut_link_is_noticed_on_both_sides_and_only_one_goes_on(job: Job, hosts: list[Host]) -> None:
    """Although the collectives would wait for ten minutes."""
    job.start(0)
    job.start(1)
    job.reaches(2)
    hosts[1].cut()
    job.reaches(1)
    assert job.nodes[1].wait() == 1, job.nodes[1].output
    assert "this node (node1) has lost the store at node0:29500" in job.nodes[1].output
    assert job.nodes[0].process.poll() is None
    job.stop()
    assert job.nodes[0].wait() == 0, job.nodes[0].output


def test_without_the_store_the_others_stop_and_say_so(job: Job) -> None:
    job.start(0)
    job.start(1)
    job.reaches(2)
    job.nodes[0].process.send_signal(signal.SIGKILL)
    assert job.nodes[1].wait() == 1, job.nodes[1].output
    assert "has lost the store at node0:29500" in job.nodes[1].output


def test_a_node_with_another_limit_is_refused_and_the_job_goes_on(job: Job) -> None:
    job.start(0)
    job.reaches(1)
    other = job.start(1, "driver.max_nodes=2")
    assert other.wait() == 2
    assert "node node0, which came first, has driver.max_nodes 3, but node node1 has 2" in other.output
    job.stop()
    assert job.nodes[0].wait() == 0, job.nodes[0].output


@pytest.mark.nightly  # by day ranks are killed and their number changes on one host: tests/campaign/test_kills.py
def test_every_sample_is_trained_on_once_while_nodes_come_and_go(start_on: Start, tmp_path: Path) -> None:
    """The trainer's own ledger, over a late joiner and a killed node: what was undone was done again, once."""
    settings = (
        *("driver=torchrun", "app=certify", "app.training.num_epochs=60", "app.data.kwargs.delay_s=0.004"),
        *("app.training.checkpoint_every_steps=10", "driver.nproc_per_node=1", "driver.rdzv_id=my_job"),
        *("driver.rdzv_backend=c10d", "driver.rdzv_endpoint=node0:29500", "driver.min_nodes=1", "driver.max_nodes=3"),
    )
    nodes = [start_on(0, *settings), start_on(1, *settings)]

    def worlds() -> set[int]:
        files = tmp_path.glob("outputs/*/ledger/step-*.jsonl")
        return {json.loads(path.read_text().splitlines()[0])["world_size"] for path in files}

    def explain() -> str:
        return "\n".join(f"--- {node.name}\n{node.output}" for node in nodes)

    wait_for(lambda: 2 in worlds(), PATIENCE_S, explain)
    nodes.append(start_on(2, *settings))
    wait_for(lambda: 3 in worlds(), PATIENCE_S, explain)
    nodes[2].process.send_signal(signal.SIGKILL)
    assert nodes[0].wait() == 0, explain()
    assert nodes[1].wait() == 0, explain()

    uses: Counter[tuple[int, int]] = Counter()
    last_world = 0
    for path in sorted(tmp_path.glob("outputs/*/ledger/step-*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            uses.update((entry["epoch"], sample) for sample in entry["samples"])
            last_world = entry["world_size"]
    assert set(uses.values()) == {1}
    assert len(uses) == 60 * len({sample for _, sample in uses})
    assert last_world == 2
