"""Tiny trainings that the tests run on one, two and three ranks."""

from __future__ import annotations

import json
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


class DoubleNet(TinyNet):
    """In the type of the data: nothing is to be converted."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


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
    sections = {
        key: training.pop(key) for key in ("model", "validation", "early_stopping", "parallel") if key in training
    }
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
    from everyrank.training.tracking.history import read_history

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


class Noting(Dataset):
    """A dataset that notes which of its samples were read, in their order."""

    def __init__(self, source: TensorDataset) -> None:
        self.source = source
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read.append(index)
        return self.source[index]


def train_and_note_samples(folder: Path) -> list[list[int]]:
    """Train two epochs of 20 samples; returns what this rank read in each."""
    with everyrank.join(device="cpu") as world:
        trainer = TrainerDDP(config=make_config(folder / "run", num_epochs=2), world=world)
        data = Noting(make_data(20))
        trainer.prepare_dataloaders(train_dataset=data)
        trainer.run_training()
        half = len(data.read) // 2
        return [data.read[:half], data.read[half:]]


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
            if self.harm == "group":  # this is a loader process: a signal to its rank and all loader processes
                import psutil

                rank = psutil.Process(os.getppid())
                for process in [*rank.children(), rank]:
                    process.send_signal(signal.SIGTERM)
            else:
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
            result = outcome(trainer, trainer.run_training(train_loader, val_loader))
            return {**result, "num_read": deadly.num_read}
        except Preempted as stopped:
            return {"preempted": str(stopped), "step": trainer.step, "epoch": trainer.epoch}


def poisoned(num_bad: int = 1) -> TensorDataset:
    """Data in which sample 17 (and maybe its neighbours) gives a loss that is NaN."""
    x, y = make_data().tensors
    y = y.clone()
    y[17 : 17 + num_bad] = float("nan")
    return TensorDataset(x, y)


def note_updates(trainer: TrainerDDP) -> list[int]:
    """Return a list that the optimizer adds the trainer's step to whenever it changes this rank's weights."""
    updates: list[int] = []
    trainer.optimizer.register_step_post_hook(lambda *_: updates.append(trainer.step))
    return updates


def train_poisoned(folder: Path, policies: list[str]) -> dict[str, Any]:
    """Train with each policy and return what came of each."""
    found: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        for policy in policies:
            trainer = TrainerDDP(config=make_config(folder / policy, num_epochs=1, nan_policy=policy), world=world)
            trainer.prepare_dataloaders(train_dataset=poisoned())
            updates = note_updates(trainer)
            try:
                result = outcome(trainer, trainer.run_training())
            except NonFiniteLossError as error:
                result = {"error": str(error), "rank": error.rank, "step": error.step, "samples": error.samples}
            found[policy] = {**result, "num_updates": len(updates)}
    return found


def train_options(folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train float32 variants; a variant that is refused gives its message."""
    found: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        x, y = (tensor.float() for tensor in make_data().tensors)
        data = TensorDataset(x, y)
        for name, changes in variants.items():
            settings = {"dtype": None, "num_epochs": 2, "validation": {"batch_size": 50}, **changes}
            config = make_config(folder / name, **settings)
            try:
                trainer = TrainerDDP(config=config, world=world)
            except everyrank.ConfigError as error:
                found[name] = str(error)
                continue
            train_loader, val_loader, _ = trainer.prepare_dataloaders(train_dataset=data, val_dataset=data)
            found[name] = outcome(trainer, trainer.run_training(train_loader, val_loader))
    return found


def resume_options(folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train each variant for one epoch, then go on with a second trainer for another."""
    train_options(folder, {name: {**changes, "num_epochs": 1} for name, changes in variants.items()})
    return train_options(folder, variants)


def stop_early(folder: Path, rank_sees: str) -> dict[str, Any]:
    """Train with an early stopping that would never agree between the ranks if each saw its own shard."""
    with everyrank.join(device="cpu") as world:
        stopping = {"kwargs": {"patience": 2, "delta": 0.02, "metric": ["val_loss", "val_error"], "combine": "all"}}
        config = make_config(folder / "run", num_epochs=40, early_stopping=stopping)
        config["validation"]["batch_size"] = 1
        trainer = TrainerDDP(config=config, world=world)
        train_loader, val_loader, _ = trainer.prepare_dataloaders(make_data(60), split=[0.5, 0.5, 0.0])
        return outcome(trainer, trainer.run_training(train_loader, val_loader))


def study(folder: Path, num_trials: int) -> dict[str, Any]:
    """Run an Optuna study on all ranks; rank 0 holds the trials."""
    import contextlib

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruned: list[int] = []
    with everyrank.join(device="cpu", timeout_s=60) as world:

        def objective(trial: Any) -> float:
            lr = everyrank.broadcast_decision(trial.suggest_float("lr", 1e-6, 0.1, log=True) if trial else None)
            number = everyrank.broadcast_decision(trial.number if trial else None)
            config = make_config(folder / str(number), num_epochs=4, optimizer_kwargs={"lr": lr})
            trainer = TrainerDDP(config=config, world=world)
            train_loader, val_loader, _ = trainer.prepare_dataloaders(make_data(40))
            try:
                _, validation = trainer.run_training(train_loader, val_loader, trial=trial)
            except optuna.TrialPruned:
                pruned.append(number)
                raise
            return validation[-1]["loss"]

        states: list[str] = []
        if world.is_main:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
            found = optuna.create_study(pruner=pruner, sampler=optuna.samplers.RandomSampler(seed=3))
            found.optimize(objective, n_trials=num_trials)
            states = [trial.state.name for trial in found.trials]
        else:
            for _ in range(num_trials):
                with contextlib.suppress(optuna.TrialPruned):
                    objective(None)
        everyrank.barrier()
    return {"pruned": pruned, "states": states}


class OnlyOnRankZero(Dataset):
    """Validation data that other ranks do not have."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        assert everyrank.current_world().is_main, "this rank has no validation data"
        return make_data(5)[index]


def rank0_validation_and_splits(folder: Path) -> dict[str, Any]:
    """Validate on rank 0 alone, and tell how this rank would split a dataset."""
    with everyrank.join(device="cpu") as world:
        config = make_config(folder, num_epochs=1, validation={"on": "rank0", "batch_size": 2}, checkpoint_at=1)
        torch.manual_seed(world.rank)  # whatever a script did to the global generators, the splits agree
        trainer = TrainerDDP(config=config, world=world)
        torch.manual_seed(world.rank)
        parts = trainer.prepare_dataloaders(make_data(50), split=[0.6, 0.2, 0.2])
        train_loader, val_loader, _ = trainer.prepare_dataloaders(
            train_dataset=make_data(20), val_dataset=OnlyOnRankZero()
        )
        result = outcome(trainer, trainer.run_training(train_loader, val_loader))
    return {**result, "split": [part.dataset.indices.tolist() for part in parts]}


def note_save(saved: Any) -> None:
    """What ``after_save`` is set to: write the step and a number of each part beside the checkpoints."""
    average = saved.average
    numbers = {
        "model": saved.model["0.weight"].sum().item(),
        "average": average["0.weight"].sum().item() if average is not None else None,
        "num_groups": len(saved.optimizer["param_groups"]),
    }
    (saved.path.parent.parent / f"after-{saved.step}.json").write_text(json.dumps(numbers))


def is_bias(name: str, parameter: Tensor) -> bool:
    """A part of the model by a function."""
    return name.endswith("bias")


def predict(folder: Path) -> dict[str, Any]:
    """Train a little and ask the model about each sample of several datasets."""
    with everyrank.join(device="cpu") as world:
        trainer = TrainerDDP(config=make_config(folder, num_epochs=1, ema={"decay": 0.5}), world=world)
        trainer.prepare_dataloaders(train_dataset=make_data(20))
        trainer.run_training()
        sizes = (11, 2)
        return {
            "average": {name: value.clone() for name, value in trainer.ema.average.items()} if trainer.ema else {},
            "plain": [trainer.predict(make_data(size), batch_size=3) for size in sizes],
            "mapped": trainer.predict(
                make_data(7), lambda output, data: {"x": data[0], "y": output[:, 0]}, batch_size=2
            ),
        }


def start_from(folder: Path, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """Go on from the state of another program."""
    with everyrank.join(device="cpu") as world:
        config = make_config(folder, num_epochs=2, scheduler={"type": _step_lr, "interval": "step"})
        trainer = TrainerDDP(config=config, world=world)
        trainer.prepare_dataloaders(train_dataset=make_data())
        trainer.start_from(step, **state)
        return outcome(trainer, trainer.run_training())


def _step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.5)
