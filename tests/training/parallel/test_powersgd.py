"""PowerSGD over several buckets, which DDP rearranges after the first step, and its state in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wide

import everyrank
from conftest import nightly


def hooked(rank: int, **changes: Any) -> dict[str, Any]:
    hook = {"comm_hook": "powersgd", "powersgd_rank": rank, "powersgd_start_step": 2, "bucket_cap_mb": 0.1}
    return {"parallel": hook, **changes}


@pytest.mark.parametrize("size", [nightly(2), 3])
def test_gradients_of_low_rank_arrive_whole(tmp_path: Path, size: int) -> None:
    """A batch of three samples gives gradients of rank three: PowerSGD of that rank then is plain DDP."""
    runs = [{"name": "plain"}, hooked(3, name="powersgd")]
    found = everyrank.launch(wide.train, tmp_path, runs, 3, nproc_per_node=size)
    plain, powersgd = found[0]
    assert powersgd["num_buckets"] > 1
    assert powersgd["step"] == 16
    for name, value in plain["weights"].items():
        torch.testing.assert_close(powersgd["weights"][name], value, rtol=0, atol=1e-8)
        assert all(torch.equal(rank[1]["weights"][name], powersgd["weights"][name]) for rank in found)


@pytest.mark.parametrize("first", [1, 3, 5])
def test_a_run_goes_on_bitwise_with_what_it_has_not_sent(tmp_path: Path, first: int) -> None:
    """Resumed before, at and after the step at which compression begins."""
    changes: dict[str, Any] = {"num_epochs": 7, "checkpoint_at": 1, "keep_best": 0}
    whole = hooked(1, name="whole", **changes)
    parts = [hooked(1, name="parts", **{**changes, "num_epochs": number}) for number in (first, 7)]
    found = everyrank.launch(wide.train, tmp_path, [whole, *parts], 24, nproc_per_node=2)
    for rank in found:
        for name, value in rank[0]["weights"].items():
            assert torch.equal(rank[2]["weights"][name], value)
    assert everyrank.TrainerDDP.load_model(tmp_path / "parts") is not None


def test_what_was_not_sent_survives_another_world_size(tmp_path: Path) -> None:
    everyrank.launch(wide.train, tmp_path, [hooked(1, name="run", num_epochs=1)], nproc_per_node=2)
    found = everyrank.launch(wide.train, tmp_path, [hooked(1, name="run", num_epochs=2)], nproc_per_node=3)
    assert found[0][0]["step"] == 8
    assert all(torch.equal(rank[0]["weights"]["2.weight"], found[0][0]["weights"]["2.weight"]) for rank in found)


def test_recording_a_static_graph_leaves_no_trace(tmp_path: Path) -> None:
    """Neither in how long the warm-up is, nor in what was not sent: at the start, and where a run goes on."""
    changes: dict[str, Any] = {"num_epochs": 4, "accumulation_steps": 2, "checkpoint_at": 1, "keep_best": 0}
    static = hooked(1, **changes)
    static["parallel"]["static_graph"] = True
    runs = [hooked(1, name="recorded never", **changes), {**static, "name": "whole"}]
    runs += [{**static, "name": "parts", "num_epochs": number} for number in (2, 4)]
    for rank in everyrank.launch(wide.train, tmp_path, runs, nproc_per_node=2):
        for name, value in rank[0]["weights"].items():
            assert torch.equal(rank[1]["weights"][name], value), name
            assert torch.equal(rank[3]["weights"][name], value), name
