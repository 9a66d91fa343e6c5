"""Every option of the configuration has an effect, on one rank and on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import everyrank
from conftest import nightly

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"parallel": {"static_graph": True, "bucket_cap_mb": 1.0, "gradient_as_bucket_view": False}},
    "unused": {"parallel": {"find_unused_parameters": True, "broadcast_buffers": False}},
    "fsdp2": {"parallel": {"strategy": "fsdp2"}},
    "fsdp2_accumulated": {"parallel": {"strategy": "fsdp2"}, "accumulation_steps": 2, "clip_grad_norm": 1.0, "ema": {}},
    "accumulated": {"accumulation_steps": 2, "clip_grad_norm": 1.0, "ema": {}},
    "static_accumulated": {
        "parallel": {"static_graph": True},
        "accumulation_steps": 2,
        "clip_grad_norm": 1.0,
        "ema": {},
        "dropout": 0.2,
    },
    "dropped_accumulated": {"accumulation_steps": 2, "clip_grad_norm": 1.0, "ema": {}, "dropout": 0.2},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "hook_bf16": {"parallel": {"comm_hook": "bf16"}},
    "hook_fp16": {"parallel": {"comm_hook": "fp16"}},
    "powersgd": {"parallel": {"comm_hook": "powersgd", "powersgd_rank": 1, "powersgd_start_step": 4}},
    "sync_batchnorm": {"parallel": {"sync_batchnorm": True}},
    "output_device": {"parallel": {"output_device": 0}},
}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max((one["weights"][name] - other["weights"][name]).abs().max().item() for name in one["weights"])


def test_options_on_two_ranks(tmp_path: Path) -> None:
    results = everyrank.launch(tiny.train_options, tmp_path, VARIANTS, nproc_per_node=2)
    found, plain = results[0], results[0]["plain"]
    for name in VARIANTS:
        if isinstance(found[name], str):
            continue
        assert distance(found[name], results[1][name]) == 0, f"{name}: the ranks' weights differ"
        assert found[name]["training"][-1]["loss"] < found[name]["training"][0]["loss"]
    for name in ("static_graph", "unused", "fsdp2"):
        assert distance(found[name], plain) < 1e-6, name
    assert distance(found["fsdp2_accumulated"], found["accumulated"]) < 1e-6
    assert distance(found["static_accumulated"], found["dropped_accumulated"]) == 0
    for name in ("bf16", "fp16", "hook_bf16", "hook_fp16", "powersgd"):
        assert 0 < distance(found[name], plain) < 0.1, f"{name} has no effect, or too much"
    assert "SyncBatchNorm works on CUDA only" in found["sync_batchnorm"]
    assert "Leave it null on a CPU" in found["output_device"]


def test_options_are_resumed(tmp_path: Path) -> None:
    names = ("fsdp2_accumulated", "static_accumulated", "accumulated", "fp16", "powersgd")
    variants = {name: VARIANTS[name] for name in names}
    resumed = everyrank.launch(tiny.resume_options, tmp_path / "resumed", variants, nproc_per_node=2)
    whole = everyrank.launch(tiny.train_options, tmp_path / "whole", variants, nproc_per_node=2)
    for name in names:
        assert distance(resumed[1][name], whole[1][name]) == 0, name
        assert resumed[0][name]["validation"][-1]["loss"] == whole[0][name]["validation"][-1]["loss"]
    # what FSDP2 saved loads into a plain model
    model = everyrank.TrainerDDP.load_model(tmp_path / "whole" / "fsdp2_accumulated", average=False)
    for name, value in whole[0]["fsdp2_accumulated"]["weights"].items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("backend", ["aot_eager", nightly("inductor")])
def test_a_compiled_model_keeps_its_names_and_its_numbers(tmp_path: Path, backend: str) -> None:
    variants = {
        "compiled": {"compile": {"dynamic": True, "backend": backend}, "num_epochs": 1},
        "plain": {"num_epochs": 1},
    }
    (found,) = everyrank.launch(tiny.train_options, tmp_path, variants, nproc_per_node=1)
    assert distance(found["compiled"], found["plain"]) < 1e-5
    assert set(found["compiled"]["weights"]) == set(tiny.TinyNet().state_dict())
