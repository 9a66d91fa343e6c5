"""Trainings with local updates that the tests run, and the same by hand in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _world

import everyrank
from everyrank import TrainerDDP
from everyrank.data.permutation import GlobalPermutation
from everyrank.data.sampler import split_evenly
from everyrank.errors import NonFiniteLossError
from everyrank.training.seeding import seed_everywhere


class NormNet(nn.Sequential):
    """With batch statistics, and a table that no forward pass changes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        self.register_buffer("table", torch.arange(5.0) / 3)


def by_hand(
    size: int,
    *,
    every: int,
    num_epochs: int,
    outer: tuple[float, float] | None = None,
    start: int = 0,
    accumulation: int = 1,
    clip: float | None = None,
    optimizer_type: Any = torch.optim.SGD,
    optimizer_kwargs: dict[str, Any] | None = None,
    num_samples: int = 103,
) -> tuple[list[float], dict[str, Tensor]]:
    """Local updates on ``size`` models of one process, written out; ``outer`` is a learning rate and a momentum."""
    seed_everywhere(42)
    first = tiny.TinyNet().double()
    models = [copy.deepcopy(first) for _ in range(size)]
    kwargs = optimizer_kwargs or {"lr": 0.05, "momentum": 0.9}
    optimizers = [optimizer_type(model.parameters(), **kwargs) for model in models]
    anchor = [p.detach().clone() for p in first.parameters()]
    momenta = [torch.zeros_like(p) for p in anchor]
    x, y = tiny.make_data(num_samples).tensors
    losses: list[float] = []
    apart = 0

    def meet() -> None:
        for number, place in enumerate(anchor):
            ours = [list(model.parameters())[number] for model in models]
            mean = torch.stack([p.detach() for p in ours]).mean(0)
            if outer is None:
                place.copy_(mean)
            else:
                lr, momentum = outer
                update = place - mean
                momenta[number].mul_(momentum).add_(update)
                place.sub_(lr * (update + momentum * momenta[number]))
            for parameter in ours:
                parameter.data.copy_(place)

    for epoch in range(num_epochs):
        order = torch.from_numpy(GlobalPermutation(num_samples, seed=42).indices(epoch, 0, num_samples))
        for step_rows in order.split(10 * accumulation):
            total = 0.0
            for rank, model in enumerate(models):
                optimizers[rank].zero_grad()
                for rows in step_rows.split(10):
                    begin, end = split_evenly(0, len(rows), rank, size)
                    mine = rows[begin:end] if end > begin else rows[:1]
                    weight = (end - begin) * size / len(step_rows)
                    loss = nn.functional.mse_loss(model(x[mine]), y[mine]) * weight
                    loss.backward()
                    total += loss.item() / size
            losses.append(total)
            if len(losses) <= start:
                for ours in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack([p.grad for p in ours]).mean(0)
                    for parameter in ours:
                        parameter.grad = mean.clone()
            for rank, model in enumerate(models):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizers[rank].step()
            if len(losses) <= start:
                for place, parameter in zip(anchor, models[0].parameters(), strict=True):
                    place.copy_(parameter.detach())
                continue
            apart += 1
            if (len(losses) - start) % every == 0:
                meet()
                apart = 0
        if apart:  # every epoch is validated
            meet()
            apart = 0
    return losses, models[0].state_dict()


def count_collectives() -> int:
    """Collectives that this process has started so far, on all its groups, as c10d counts them."""
    return sum(group._get_sequence_number_for_group() for group in _world.pg_map)


def train_and_count(folder: Path, changes: dict[str, Any], validate: bool) -> dict[str, Any]:
    """Train, and return how many collectives there had been at each step's forward pass, and the meetings' steps."""
    counts: list[int] = []

    def criterion(output: Tensor, data: Any) -> Tensor:
        if output.requires_grad:
            counts.append(count_collectives())
        return tiny.compute_loss(output, data)

    with everyrank.join(device="cpu") as world:
        config = {**tiny.make_config(folder / "run", **changes), "criterion": criterion}
        trainer = TrainerDDP(config=config, world=world)
        train_loader, _, _ = trainer.prepare_dataloaders(train_dataset=tiny.make_data())
        _, val_loader, _ = trainer.prepare_dataloaders(train_dataset=tiny.make_data(), val_dataset=tiny.make_data(20))
        trainer.run_training(train_loader, val_loader if validate else None)
        return {"counts": counts, "weights": tiny.weights(trainer)}


def train_norms(folder: Path) -> dict[str, Any]:
    """Train with batch statistics for one meeting; return what each rank had before and has after."""
    with everyrank.join(device="cpu") as world:
        parallel = {"local_updates": {"every": 4}}
        config = tiny.make_config(folder / "run", num_epochs=1, parallel=parallel)
        config["model"] = {"type": NormNet}
        trainer = TrainerDDP(config=config, world=world)
        trainer.prepare_dataloaders(train_dataset=tiny.make_data(40))
        before: dict[str, Tensor] = {}
        trainer.optimizer.register_step_post_hook(
            lambda *_: before.update(tiny.weights(trainer))
        )  # the last step's stay
        trainer.run_training()
        return {"before": before, "after": tiny.weights(trainer)}


def train_poisoned_apart(folder: Path, policies: list[str]) -> dict[str, Any]:
    """Train on a sample whose loss is NaN with each policy."""
    found: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        for policy in policies:
            scheduler = {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 11}, "interval": "step"}
            settings = {"num_epochs": 1, "nan_policy": policy, "scheduler": scheduler}
            parallel = {"local_updates": {"every": 4}}
            config = tiny.make_config(folder / policy, parallel=parallel, **settings)
            trainer = TrainerDDP(config=config, world=world)
            trainer.prepare_dataloaders(train_dataset=tiny.poisoned())
            updates = tiny.note_updates(trainer)
            try:
                result = tiny.outcome(trainer, trainer.run_training())
            except NonFiniteLossError as error:
                result = {"error": str(error), "rank": error.rank, "step": error.step}
            lr = trainer.optimizer.param_groups[0]["lr"]
            found[policy] = {**result, "num_updates": len(updates), "lr": lr}
    return found


def optimizer_after_resume(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the state of this rank's optimizer as a trainer finds it."""
    with everyrank.join(device="cpu") as world:
        trainer = TrainerDDP(config=tiny.make_config(folder / "run", **changes), world=world)
        return {"step": trainer.step, "state": copy.deepcopy(trainer.optimizer.state_dict()["state"])}


def train_on_folders_of_their_own(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train where each rank has a folder that the others do not see."""
    with everyrank.join(device="cpu") as world:
        trainer = TrainerDDP(config=tiny.make_config(folder / f"node{world.rank}", **changes), world=world)
        trainer.prepare_dataloaders(train_dataset=tiny.make_data())
        trainer.run_training()
        return {"step": trainer.step, "weights": tiny.weights(trainer)}
