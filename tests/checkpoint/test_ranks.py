"""Several ranks save, fail and load as one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import everyrank
from everyrank.checkpoint.export import export
from everyrank.checkpoint.folder import list_checkpoints

sys.path.insert(0, str(Path(__file__).parent / "programs"))  # also the ranks'

import saving_ranks


def run_ranks(tmp_path: Path, world_size: int, what: str) -> list[dict[str, Any]]:
    folder = tmp_path / "checkpoints"
    return everyrank.launch(
        saving_ranks.run, folder, what, nproc_per_node=world_size, preload=("torch.distributed.fsdp",)
    )


def test_three_ranks_save_and_two_load(tmp_path: Path) -> None:
    saved = run_ranks(tmp_path, 3, "save")
    assert saved[0] == saved[1] == saved[2], "every rank gets the same answers and the same errors"
    assert saved[0]["latest"] == 2
    assert "'odd'" in saved[0]["refused"]
    for when in ("background", "foreground"):
        assert "could not be written" in saved[0][when]
    loaded = run_ranks(tmp_path, 2, "load")
    assert loaded[0] == loaded[1]
    refused = loaded[0].pop("refused")
    assert "model.safetensors has 0 bytes" in refused
    assert loaded[0] == {
        "step": 2,
        "weight": 20.0,
        "state": {"rank": 0},
        "rank_states": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        "world_size": 3,
    }


def test_parameters_spread_by_fsdp_load_whole_at_any_world_size(tmp_path: Path) -> None:
    spread = run_ranks(tmp_path, 3, "spread")
    # a checkpoint that lacks a rank's part does not appear, and all ranks know
    assert spread == [{"failed": True, "left": []}] * 3
    parts = [f"model.shard-{rank:05d}.safetensors" for rank in range(3)]
    for world_size in (1, 2):
        for report in run_ranks(tmp_path, world_size, "whole"):
            assert report["same"]
            files = ["empty.safetensors", "manifest.json", "model.safetensors", *parts, "plain.safetensors"]
            assert report["files"] == [*files, "state.json"]
    folder = tmp_path / "checkpoints" / "sharded"
    assert all(info.verified for info in list_checkpoints(folder))
    out = export(folder, tmp_path / "model.pth")
    assert torch.load(out, weights_only=True)["0.weight"].shape == (5, 7)
    (folder / "step-00000002" / parts[1]).unlink()
    assert [info.reason for info in list_checkpoints(folder)] == ["", f"{parts[1]} is missing"]
