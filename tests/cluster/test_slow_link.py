"""Two hosts on a slow link: what travels over it in each step, with the settings of the cluster guide."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.hosts import Host, missing
from cluster.running import Running
from conftest import ROOT, nightly

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]
MODEL_BYTES = 4 * (256 * 256 + 256)
NODES = ("driver=torchrun", "driver.nnodes=2", "driver.master_addr=node0", "driver.master_port=29500")


@pytest.fixture
def slow_hosts(hosts: list[Host]) -> Iterator[list[Host]]:
    """Two hosts that send no more than 100 Mbit/s each."""
    if missing("tc"):
        pytest.skip(missing("tc"))
    for host in hosts[:2]:
        host.limit(100)
    yield hosts[:2]
    for host in hosts[:2]:
        host.mend()


def settings_of_the_guide() -> list[dict[str, Any]]:
    """The ``parallel`` sections in the guide's chapter on slow networks."""
    guide = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    chapter = guide.split("## A slow network")[1].split("\n## ")[0]
    found = [yaml.safe_load(block)["parallel"] for block in re.findall(r"```yaml\n(.*?)```", chapter, re.DOTALL)]
    assert len(found) == 3
    return found


def train(start_on: Start, folder: Path, name: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    app = ("app=custom", "app._target_=slow_link_app.Trains", f"+app.result={folder / name}")
    text = json.dumps(parallel).replace('"', "")  # Hydra's grammar has no quoted keys
    nodes = [start_on(rank, *NODES, *app, f"+app.parallel={text}", f"driver.node_rank={rank}") for rank in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].output + nodes[1].output
    ranks = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["step"] == 24
        assert rank["sums"][0] == rank["sums"][1], "the ranks end with different models"
    return ranks


def per_step(rank: dict[str, Any]) -> list[int]:
    return [after - before for before, after in zip(rank["sent"], rank["sent"][1:], strict=False)]


def test_compressed_gradients_are_half_the_bytes(start_on: Start, slow_hosts: list[Host], tmp_path: Path) -> None:
    bf16 = settings_of_the_guide()[0]
    plain = train(start_on, tmp_path, "plain", {})
    narrow = train(start_on, tmp_path, "bf16", bf16)
    for rank in (0, 1):
        whole, half = (sorted(per_step(run[rank]))[len(per_step(run[rank])) // 2] for run in (plain, narrow))
        assert whole > MODEL_BYTES
        assert 0.45 < half / whole < 0.55


@pytest.mark.parametrize("number", [1, nightly(2)])
def test_with_local_updates_a_step_sends_nothing(
    start_on: Start, slow_hosts: list[Host], tmp_path: Path, number: int
) -> None:
    parallel = settings_of_the_guide()[number]
    parallel["local_updates"]["every"] = 8
    plain = train(start_on, tmp_path, "plain", {})
    apart = train(start_on, tmp_path, "apart", parallel)
    # Three syncs in place of 24 exchanges, which may be in bfloat16. The kernel still sends the end of a sync
    # while the next steps are taken, so single steps tell little; half of them are after that.
    share = 3 / 24 * (0.5 if parallel["local_updates"].get("compress") else 1)
    for rank in (0, 1):
        assert sum(per_step(apart[rank])) < 1.2 * share * sum(per_step(plain[rank]))
        assert sorted(per_step(apart[rank]))[11] < 2048, "the launcher's and the kernel's own messages, no tensor"
