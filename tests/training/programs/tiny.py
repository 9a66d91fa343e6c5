"""Tiny trainings that the tests run on one, two and three ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import everyrank
from everyrank import TrainerDDP
from everyrank.errors import NonFiniteLossError, Preempted


class TinyNet(nn.Sequential):
    """Two layers; with dropout the randomness of the ranks matters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 2))


def compute_loss(output: Tensor, data: Any) -> Tensor:
    """Return the mean squared error."""
    return nn.functional.mse_loss(output, data[1])


def mean_error(output: Tensor, data: Any) -> Tensor:
    """Return the mean absolute error, as a metric."""
    return (output - data[1]).abs().mean()


def make_data(num_samples: int = 103, seed: int = 0) -> TensorDataset:
    """Return a small regression in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_samples, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x[:, :2].sin() + 0.1 * noise)


def make_config(path: Path | str, **training: Any) -> dict[str, Any]:
    """Return a configuration; keys of ``training`` change that section, ``dropout`` the model."""
    dropout = training.pop("dropout", 0.0)
    sections = {key: training.pop(key) for key in ("validation", "early_stopping", "parallel") if key in training}
    settings: dict[str, Any] = {
        "path": str(path),
        "num_epochs": 3,
        "global_batch_size": 10,
        "device": "cpu",
        "dtype": "float64",
        "optimizer_type": torch.optim.SGD,
        "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9},
        "log_every_steps": 1,
        "plots": False,
        "tracking": {"tensorboard": False},
        "progress": "off",
    }
    return {
        "criterion": compute_loss,
        "model": {"type": TinyNet, "kwargs": {"dropout": dropout}},
        "training": {**settings, **training},
        "validation": {"batch_size": 7, "metrics": {"error": mean_error}},
        "parallel": {},
        **sections,
    }


def weights(trainer: TrainerDDP) -> dict[str, Tensor]:
    """Return the bare model's weights, whole."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in trainer.module.state_dict().items()
    }


def outcome(trainer: TrainerDDP, histories: Any) -> dict[str, Any]:
    """Return what a test compares."""
    return {
        "rank": trainer.world.rank,
        "epoch": trainer.epoch,
        "step": trainer.step,
        "training": histories[0],
        "validation": histories[1],
        "weights": weights(trainer),
        "steps": read_steps(trainer.run),
    }


def read_steps(run: Path) -> list[tuple[int, float]]:
    """Return the recorded steps and their losses."""
    from everyrank.training.history import read_history

    return [(row["step"], row["loss"]) for row in read_history(run / "history.jsonl") if row["kind"] == "step"]


def train(folder: Path, variants: dict[str, dict[str, Any]], num_samples: int = 103) -> dict[str, dict[str, Any]]:
    """Train each variant in its own folder and return what came of each."""
    results = {}
    with everyrank.join(device="cpu") as world:
        for name, changes in variants.items():
            changes = dict(changes)
            data = make_data(changes.pop("num_samples", num_samples))
            trainer = TrainerDDP(config=make_config(folder / name, **changes), world=world)
            train_loader, _, _ = trainer.prepare_dataloaders(train_dataset=data)
            _, val_loader, _ = trainer.prepare_dataloaders(train_dataset=data, val_dataset=make_data(53, seed=1))
            results[name] = outcome(trainer, trainer.run_training(train_loader, val_loader))
    return results


class Deadly(Dataset):
    """A dataset in which one sample, the n-th time it is read in this process, does harm; then never again."""

    def __init__(self, source: TensorDataset, mark: Path, rank: int, after: int, harm: str) -> None:
        self.source, self.mark, self.rank, self.after, self.harm = source, mark, rank, after, harm
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        self.num_read += 1
        if self.num_read == self.after and everyrank.current_world().rank == self.rank and not self.mark.exists():
            self.mark.touch()
            if self.harm == "raise":
                raise ValueError(f"sample {index} cannot be read")
            os.kill(os.getpid(), getattr(signal, self.harm))
        return self.source[index]


def train_with_harm(folder: Path, changes: dict[str, Any], rank: int, after: int, harm: str) -> dict[str, Any]:
    """Train with a Deadly dataset; a preempted run returns its message."""
    changes = dict(changes)
    harmed = changes.pop("harmed", "training")
    with everyrank.join(device="cpu", timeout_s=60) as world:
        trainer = TrainerDDP(config=make_config(folder / "run", **changes), world=world)
        data, held_out = make_data(), make_data(53, seed=1)
        deadly = Deadly(data if harmed == "training" else held_out, folder / "harmed", rank, after, harm)
        train_loader, val_loader, _ = trainer.prepare_dataloaders(
            train_dataset=deadly if harmed == "training" else data,
            val_dataset=deadly if harmed == "validation" else held_out,
        )
        try:
            return outcome(trainer, trainer.run_training(train_loader, val_loader))
        except Preempted as stopped:
            return {"preempted": str(stopped), "step": trainer.step, "epoch": trainer.epoch}


def poisoned(num_bad: int = 1) -> TensorDataset:
    """Data in which sample 17 (and maybe its neighbours) gives a loss that is NaN."""
    x, y = make_data().tensors
    y = y.clone()
    y[17 : 17 + num_bad] = float("nan")
    return TensorDataset(x, y)


def train_poisoned(folder: Path, policies: list[str]) -> dict[str, Any]:
    """Train with each policy and return what came of each."""
    found: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        for policy in policies:
            trainer = TrainerDDP(config=make_config(folder / policy, num_epochs=1, nan_policy=policy), world=world)
            trainer.prepare_dataloaders(train_dataset=poisoned())
            try:
                result = outcome(trainer, trainer.run_training())
            except NonFiniteLossError as error:
                result = {"error": str(error), "rank": error.rank, "step": error.step, "samples": error.samples}
            found[policy] = {**result, "num_skipped": trainer._position.num_skipped}
    return found
