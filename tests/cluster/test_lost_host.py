"""A host of two that is lost: its rank is named with the cause, by the host that is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from troubleshooting_page import ENTRIES

from cluster.running import PATIENCE_S, Running, wait_for

pytestmark = pytest.mark.cluster


def test_a_lost_host_is_named(start_on: Callable[..., Running], tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    folder.mkdir()
    nodes = [
        start_on(
            rank,
            *("driver=torchrun", "app=custom", "app._target_=elastic_apps.Loops", f"+app.folder={folder}"),
            "driver.nproc_per_node=1",
            *(
                "driver.nnodes=2",
                f"driver.node_rank={rank}",
                "driver.master_addr=node0",
                "driver.master_port=29500",
                "run.name=lost",
                "watch.lost_after_s=3",
            ),
        )
        for rank in (0, 1)
    ]
    wait_for((folder / "world-0-2").exists, PATIENCE_S, lambda: nodes[0].output + nodes[1].output)
    nodes[1].process.kill()
    assert nodes[0].wait() == 1, nodes[0].output
    assert ENTRIES["verdict-lost-host"].missing(nodes[0].output) == [], nodes[0].output
    verdict = json.loads(next(tmp_path.glob("outputs/lost*/verdict.json")).read_text())
    assert (verdict["rank"], verdict["cause"], verdict["host"]) == (1, "lost_host", "node1")
