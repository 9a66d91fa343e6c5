"""A network whose gradients travel in several of DDP's buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn

import everyrank
from everyrank import TrainerDDP


class WideNet(nn.Sequential):
    """1.3 MB of weights in three layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 2))


def train(folder: Path, runs: list[dict[str, Any]], batch: int = 6) -> list[dict[str, Any]]:
    """Train once for each set of changes, one after the other; return the weights of each."""
    found = []
    with everyrank.join(device="cpu") as world:
        for changes in runs:
            changes = dict(changes)
            name = changes.pop("name")
            settings = {"num_epochs": 2, "global_batch_size": batch, "optimizer_kwargs": {"lr": 0.05}, **changes}
            config = {**tiny.make_config(folder / name, **settings), "model": {"type": WideNet}}
            trainer = TrainerDDP(config=config, world=world)
            trainer.prepare_dataloaders(train_dataset=tiny.make_data(24))
            trainer.run_training()
            num_buckets = len(trainer.model.reducer._get_zeros_like_grad_buckets()) if world.is_distributed else 0
            found.append({"weights": tiny.weights(trainer), "step": trainer.step, "num_buckets": num_buckets})
            torch.manual_seed(0)
    return found
