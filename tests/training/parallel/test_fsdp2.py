"""FSDP2 takes DDP's steps, whatever the model's shape, and however often one evaluates and saves."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch

import everyrank

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
SHAPES: dict[str, dict[str, Any]] = {
    name: {"model": name, "num_epochs": 2, "accumulation_steps": 2, "clip_grad_norm": 1.0} for name in numerics.MODELS
}


@pytest.mark.parametrize("variants", [AVERAGED, SHAPES], ids=["average", "shapes"])
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
