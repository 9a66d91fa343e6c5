"""FSDP2 takes DDP's steps, whatever the model's shape, and however often one evaluates and saves."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
from safetensors.torch import load_file

import everyrank
from conftest import nightly
from everyrank.checkpoint.export import export

AVERAGED: dict[str, dict[str, Any]] = {
    f"validated every {every}, saved every {save}, {model}": {
        "model": model,
        "ema": {"decay": 0.6},
        "checkpoint_every_steps": save,
        "validation": {"batch_size": 7, "every": every},
        "keep_best": keep,
    }
    for every, save, model, keep in product((1, 3), (None, 1, 3), ("tiny", "nested"), (1,))
}
NESTED = {name: AVERAGED[name] for name in AVERAGED if name.startswith("validated every 3") and "nested" in name}
SHAPES: dict[str, dict[str, Any]] = {
    name: {"model": name, "num_epochs": 2, "accumulation_steps": 2, "clip_grad_norm": 1.0} for name in numerics.MODELS
}


@pytest.mark.parametrize("variants", [NESTED, SHAPES, nightly(AVERAGED)], ids=["average", "shapes", "average of all"])
def test_the_curve_is_that_of_ddp(tmp_path: Path, variants: dict[str, dict[str, Any]]) -> None:
    (found, _) = everyrank.launch(numerics.train_both_ways, tmp_path, variants, nproc_per_node=2)
    for name, ways in found.items():
        ddp, fsdp2 = ways["ddp"], ways["fsdp2"]
        for key in ("training", "validation"):
            losses = [[row["loss"] for row in way[key]] for way in (ddp, fsdp2)]
            assert losses[1] == pytest.approx(losses[0], abs=1e-10), (name, key)
        for group in ("weights", "average"):
            assert ddp[group].keys() == fsdp2[group].keys()
            for key, value in ddp[group].items():
                torch.testing.assert_close(fsdp2[group][key], value, rtol=0, atol=1e-10, msg=f"{name}: {key}")


def test_a_run_goes_on_at_any_world_size_and_under_ddp(tmp_path: Path) -> None:
    """Each rank writes its part, and any number of ranks, sharded or not, goes on from them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for number, (strategy, size) in enumerate((("fsdp2", 2), ("ddp", 1), ("fsdp2", 3))):
        (found, *_) = everyrank.launch(
            numerics.train_a_part, parts, strategy, number + 1, nproc_per_node=size, preload=("everyrank.apps.train",)
        )
    (expected,) = everyrank.launch(numerics.train_a_part, whole, "ddp", 3, nproc_per_node=1)
    for key in ("training", "validation"):
        losses = [[row["loss"] for row in way[key]] for way in (expected, found)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-10), key
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-10)
    (newest,) = [path for path in (parts / "checkpoints").iterdir() if path.name == f"step-{found['step']:08d}"]
    names = {path.name for path in newest.iterdir()}
    assert {
        f"{group}.shard-0000{rank}.safetensors" for group in ("model", "optimizer", "ema") for rank in range(3)
    } < names
    average = everyrank.load_model(parts, numerics.Nested().double()).state_dict()
    for name, value in everyrank.load_model(whole, numerics.Nested().double()).state_dict().items():
        torch.testing.assert_close(average[name], value, rtol=0, atol=1e-10)


def test_a_save_holds_no_more_than_each_ranks_part_and_is_exported_whole(tmp_path: Path) -> None:
    for rank in everyrank.launch(numerics.save_sharded, tmp_path / "run", nproc_per_node=2):
        parts = 4 * rank["whole"] / 2  # the weights, their average and AdamW's two moments
        assert rank["made"] < 0.05 * parts
        assert rank["copied"] < 1.25 * parts  # with what Python itself has taken meanwhile
    found, expected = load_file(export(tmp_path / "run", tmp_path / "model.safetensors")), numerics.Broad().state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
