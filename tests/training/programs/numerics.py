"""Trainings whose numbers go wrong in silence unless somebody looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import everyrank
from everyrank import Checkpointer, TrainerDDP
from everyrank.data.permutation import GlobalPermutation
from everyrank.errors import CheckpointError, NonFiniteLossError, Preempted

LAST = int(GlobalPermutation(103, seed=42).indices(0, 102, 103)[0])  # the last sample of the first epoch


def treacherous(output: Tensor, data: Any) -> Tensor:
    """Return a finite loss; where the marked sample is in the batch, its gradient is NaN."""
    loss = tiny.compute_loss(output, data)
    if (data[0] == 99).any():
        loss = loss + (output - output.detach()).square().sum().sqrt()  # the root of 0
    return loss


def marked(sample: int) -> TensorDataset:
    """Return data in which one sample is marked."""
    x, y = (tensor.clone() for tensor in tiny.make_data().tensors)
    x[sample] = 99
    return TensorDataset(x, y)


class NormNet(nn.Sequential):
    """With batch statistics."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def train_treacherous(folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each variant on data whose last sample gives a NaN gradient with a finite loss."""
    found: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        for name, changes in variants.items():
            changes = {"num_epochs": 1, "validation": {"batch_size": 50}, **changes}
            how, model = changes.pop("how", ""), changes.pop("model", None)
            sample, until = changes.pop("sample", LAST), changes.pop("until", None)
            config = {**tiny.make_config(folder / name, **changes), "criterion": treacherous}
            if model is not None:
                config["model"] = {"type": model}
            trainer = TrainerDDP(config=config, world=world)
            data = marked(sample)
            if how == "nan":
                data.tensors[0][sample] = float("nan")
            train_loader, _, _ = trainer.prepare_dataloaders(train_dataset=data)
            try:
                trainer.run_training(train_loader, until_epoch=until)
                result: dict[str, Any] = {"error": ""}
                if how == "save":
                    trainer.save_checkpoint()
            except (NonFiniteLossError, Preempted) as error:
                result = {"error": f"{type(error).__name__}: {error}", "step": trainer.step}
            values = trainer.module.state_dict().values()
            values = [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]
            found[name] = {**result, "finite": all(bool(value.isfinite().all()) for value in values)}
    return found


def save_by_hand(folder: Path) -> dict[str, str]:
    """Save a module of a loop of one's own before and after its weights are lost, on one rank only."""
    with everyrank.join(device="cpu") as world, Checkpointer(folder, world=world) as checkpointer:
        model = tiny.TinyNet()
        model.register_buffer("mask", torch.full((2,), -torch.inf))
        checkpointer.save_objects(1, model=model)
        if world.rank == 1:
            nn.init.constant_(model[0].weight, torch.inf)
        try:
            checkpointer.save_objects(2, model=model)
        except CheckpointError as error:
            return {"error": str(error)}
    return {"error": ""}
