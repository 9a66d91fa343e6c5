"""Trainings whose ranks share each batch unevenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

import everyrank
from everyrank import TrainerDDP
from everyrank.errors import ConfigError


class Slow(nn.Sequential):
    """A network whose forward pass takes the longer the more samples rank 1 is given; rank 0's is short."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.matrix = torch.eye(192, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layers give; rank 1 multiplies matrices beside, for each sample."""
        for _ in range(len(x) if everyrank.current_world().rank == 1 else 0):
            self.matrix @ self.matrix
        return super().forward(x)


def train(folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each variant; return what came of it, this rank's samples of each batch, and what was saved."""
    results: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        for name, keys in variants.items():
            changes = dict(keys)
            model = changes.pop("model", tiny.TinyNet)
            config = tiny.make_config(folder / changes.pop("folder", name), ledger=True, checkpoint_at=1, **changes)
            config["model"] = {"type": model}
            try:
                trainer = TrainerDDP(config=config, world=world)
            except ConfigError as error:
                results[name] = str(error)
                continue
            loaders = trainer.prepare_dataloaders(
                train_dataset=tiny.make_data(), val_dataset=tiny.make_data(53, seed=1)
            )
            found = tiny.outcome(trainer, trainer.run_training())
            sampler = loaders[0].batch_sampler
            found["shares"] = sampler.shares
            found["counts"] = [sampler.share(batch).num_local for batch in range(len(sampler))]
            results[name] = found
    return results
