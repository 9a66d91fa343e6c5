"""No checkpoint and no export holds a weight that is not finite, unless the run is told to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numerics
import pytest
import torch

import everyrank
from everyrank.checkpoint.checkpointer import read_checkpoint
from everyrank.checkpoint.export import export
from everyrank.checkpoint.folder import list_checkpoints
from everyrank.errors import CheckpointError

EARLY = 17
VARIANTS: dict[str, dict[str, Any]] = {
    "last_step": {},
    "last_step_average": {"ema": {"decay": 0.9}},
    "skip": {"nan_policy": "skip", "ema": {"decay": 0.9}},
    "continue": {"nan_policy": "continue"},
    "each_step_saved": {"sample": EARLY, "checkpoint_every_steps": 1},
    "not_saved_by_itself": {"num_epochs": 5, "until": 1},
    "saved_by_hand": {"nan_policy": "skip", "how": "save"},
    "spoilt_by_hand": {"nan_policy": "skip", "how": "spoilt"},
    "fsdp2": {"parallel": {"strategy": "fsdp2"}},
    "apart": {"parallel": {"local_updates": {"every": 4}}},
    "statistics": {"nan_policy": "skip", "model": numerics.NormNet, "how": "nan", "sample": EARLY, "drop_last": True},
}
STOPPED = (
    "last_step",
    "last_step_average",
    "each_step_saved",
    "not_saved_by_itself",
    "spoilt_by_hand",
    "fsdp2",
    "apart",
)


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path: Path) -> None:
    ranks = everyrank.launch(numerics.train_treacherous, tmp_path, VARIANTS, nproc_per_node=2)
    for found in ranks:
        for name in STOPPED:
            assert found[name]["error"].startswith("NonFiniteLossError: weights are not finite "), name
            assert "Fix: " in found[name]["error"]
        assert "on every rank" in found["last_step"]["error"]
        assert "on rank " in found["apart"]["error"], "the ranks were apart: only one is guilty"
        for name in ("skip", "saved_by_hand", "statistics"):
            assert found[name] == {"error": "", "finite": True}
        assert found["continue"] == {"error": "", "finite": False}
    for name in VARIANTS:
        infos = list_checkpoints(tmp_path / name / "checkpoints")
        tensors = [t for i in infos for group in read_checkpoint(i.path).tensors.values() for t in group.values()]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors) == (name != "continue"), name
    assert list_checkpoints(tmp_path / "each_step_saved" / "checkpoints"), "those before the bad step stay"
    assert "Going on" in (tmp_path / "continue" / "logs" / "rank-0.log").read_text()
    with pytest.raises(CheckpointError, match=r"holds NaN or infinity in 0\.bias"):
        export(tmp_path / "continue", tmp_path / "new" / "bad.safetensors")
    assert not [path.name for path in tmp_path.iterdir() if path.name == "new" or "bad" in path.name]
    export(tmp_path / "continue", tmp_path / "bad.safetensors", allow_non_finite=True)


def test_a_loop_of_ones_own_saves_no_such_weights_either(tmp_path: Path) -> None:
    for found in everyrank.launch(numerics.save_by_hand, tmp_path, nproc_per_node=2):
        assert "not finite at step 2 on rank 1: model.0.weight" in found["error"]
    (left,) = list_checkpoints(tmp_path)
    assert left.step == 1
    assert torch.isinf(read_checkpoint(left.path).tensors["model"]["mask"]).all(), "a mask is no weight"
