"""Trainings whose numbers go wrong in silence unless somebody looks."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, TensorDataset

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
                if how == "spoilt":  # where no step has looked at them
                    nn.init.constant_(next(trainer.module.parameters()), torch.nan)
                if how in ("save", "spoilt"):
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


class Nested(nn.Module):
    """Containers in containers, a block that stands in two places, and weights that are tied across them."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(8, 8)
        self.first = nn.Linear(4, 8)
        self.rows = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), block]), nn.ModuleList([block])])
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.LayerNorm(8), nn.Linear(8, 8))
        self.inner[2].weight = self.inner[0][0].weight
        self.tied = nn.Sequential(nn.Tanh(), nn.Linear(8, 8))
        self.again = nn.Linear(8, 8)
        self.again.weight = self.tied[1].weight
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 4) to (N, 2)."""
        x = self.first(x)
        for layer in (layer for row in self.rows for layer in row):
            x = torch.tanh(layer(x))
        return self.head(self.again(self.tied(self.inner(x))))


class Residual(nn.Module):
    """A block of a residual network, from 1 x 2 x 2 images."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(2, out), nn.ReLU())
        self.downsample = nn.Sequential(nn.Conv2d(width, out, 1), nn.GroupNorm(2, out)) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to (N, out, H, W)."""
        return self.body(x) + (x if self.downsample is None else self.downsample(x))


class ResNetShape(nn.Module):
    """Sequentials of blocks with Sequentials inside, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU())
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 8), Residual(8, 8))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 4) to (N, 2)."""
        return self.fc(self.layer2(self.layer1(self.stem(x.view(-1, 1, 2, 2)))).mean((2, 3)))


class ViTShape(nn.Module):
    """An encoder of layers, a token that is a bare parameter, and a head that is a Sequential in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.patch = nn.Linear(1, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 4) to (N, 2)."""
        patches = self.patch(x[..., None])
        return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))[:, 0])


class Graphs(nn.Module):
    """Our own graph network with ``layer: gin``, on rings of four nodes."""

    def __init__(self) -> None:
        super().__init__()
        block = {"layer": "gin", "out_dim": 8, "repeat": 2}
        self.network = everyrank.GNNModel.from_config({"in_dim": 1, "blocks": [block], "heads": {"y": {"out_dim": 2}}})

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 4) to (N, 2)."""
        from torch_geometric.data import Batch, Data

        ring = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
        return self.network(Batch.from_data_list([Data(x=row[:, None], edge_index=ring) for row in x]))


MODELS: dict[str, Any] = {
    "tiny": tiny.TinyNet,
    "nested": Nested,
    "resnet": ResNetShape,
    "vit": ViTShape,
    "gin": Graphs,
}


def train_both_ways(folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Train each variant with DDP and with FSDP2; return what came of each."""
    found: dict[str, dict[str, Any]] = {}
    with everyrank.join(device="cpu") as world:
        for name, changes in variants.items():
            for strategy in ("ddp", "fsdp2"):
                changes = dict(changes)
                model = MODELS[changes.pop("model", "tiny")]
                config = tiny.make_config(folder / f"{name}-{strategy}", **changes, parallel={"strategy": strategy})
                trainer = TrainerDDP(config={**config, "model": {"type": model}}, world=world)
                data, held_out = tiny.make_data(43), tiny.make_data(20, seed=1)
                loaders = trainer.prepare_dataloaders(train_dataset=data, val_dataset=held_out)
                result = tiny.outcome(trainer, trainer.run_training(*loaders[:2]))
                averages = trainer.ema.average if trainer.ema is not None else {}
                whole = {n: a.full_tensor() if hasattr(a, "full_tensor") else a for n, a in averages.items()}
                found.setdefault(name, {})[strategy] = {**result, "average": whole}
                changes["model"] = next(key for key, kind in MODELS.items() if kind is model)
    return found


def train_a_part(run: Path, strategy: str, num_epochs: int) -> dict[str, Any]:
    """Train, or go on, until this many epochs are done."""
    with everyrank.join(device="cpu") as world:
        config = tiny.make_config(run, num_epochs=num_epochs, ema={"decay": 0.6}, parallel={"strategy": strategy})
        config["training"].update(optimizer_type=torch.optim.AdamW, optimizer_kwargs={"lr": 0.01})
        trainer = TrainerDDP(config={**config, "model": {"type": Nested}}, world=world)
        trainer.prepare_dataloaders(train_dataset=tiny.make_data(43), val_dataset=tiny.make_data(20, seed=1))
        return tiny.outcome(trainer, trainer.run_training())


class Broad(nn.Sequential):
    """Eight layers, 16 MiB in float64."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 512), *(nn.Linear(512, 512) for _ in range(7)), nn.Linear(512, 2))


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that torch makes in the block."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and count what it returns that none of its arguments holds."""
        out = func(*args, **(kwargs or {}))
        given = {_storage(tensor).data_ptr() for tensor in _tensors((args, kwargs))}
        made = {_storage(tensor).data_ptr(): _storage(tensor).nbytes() for tensor in _tensors(out)}
        self.num_bytes += sum(num_bytes for place, num_bytes in made.items() if place not in given)
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _storage(tensor: Any) -> torch.UntypedStorage:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()


def save_sharded(run: Path) -> dict[str, int]:
    """Train a step with FSDP2, and count what a save takes: by torch, and beside it for the copy that is written."""
    with everyrank.join(device="cpu") as world:
        config = tiny.make_config(run, num_steps=1, num_epochs=None, parallel={"strategy": "fsdp2"})
        config["training"].update(optimizer_type=torch.optim.AdamW, optimizer_kwargs={"lr": 0.01}, ema={"decay": 0.6})
        trainer = TrainerDDP(config={**config, "model": {"type": Broad}}, world=world)
        trainer.prepare_dataloaders(train_dataset=tiny.make_data(20))
        tracemalloc.start()  # of numpy's memory, where the copy lies: it is made once, and used again
        trainer.run_training()
        with Allocations() as made:
            trainer.save_checkpoint()
        _, copied = tracemalloc.get_traced_memory()
        whole = sum(parameter.nbytes for parameter in trainer.module.parameters())
        tracemalloc.stop()
        return {"whole": whole, "made": made.num_bytes, "copied": copied}


class Augmented(Dataset):
    """Adds noise of Python's, numpy's and torch's generators, that grows with the epoch it was told."""

    def __init__(self, source: TensorDataset) -> None:
        self.source, self.epoch = source, 0

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        """Take note of the epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.source[index]
        noise = random.random() + np.random.rand() + torch.rand(4, dtype=torch.float64)
        return x + (1 + self.epoch) * noise / 4, y


def train_augmented(folder: Path, num_workers: list[int]) -> dict[int, dict[str, Any]]:
    """Train on noisy data, at a world size, with numbers of loader workers."""
    found = {}
    with everyrank.join(device="cpu") as world:
        for number in num_workers:
            validation = {"batch_size": 7, "num_workers": number}
            config = tiny.make_config(folder / str(number), num_workers=number, validation=validation)
            trainer = TrainerDDP(config=config, world=world)
            data, held_out = Augmented(tiny.make_data(43)), Augmented(tiny.make_data(20, seed=1))
            loaders = trainer.prepare_dataloaders(train_dataset=data, val_dataset=held_out)
            found[number] = tiny.outcome(trainer, trainer.run_training(*loaders[:2]))
    return found


def summed(output: Tensor, data: Any) -> Tensor:
    """Return the sum over the samples."""
    return (output - data[1]).square().sum()


def contrastive(output: Tensor, data: Any) -> Tensor:
    """Return a loss in which each sample is compared with all others."""
    return nn.functional.cross_entropy(output @ data[1].T, torch.arange(len(output)))


def count_near(output: Tensor, data: Any) -> Tensor:
    """Return how many samples are near their target: no mean."""
    return ((output - data[1]).abs().amax(1) < 1).sum()


def try_metrics(folder: Path) -> str:
    """Validate by a metric that adds up; return what is said."""
    config = tiny.make_config(folder, num_epochs=1, validation={"batch_size": 10, "metrics": {"near": count_near}})
    with everyrank.join(device="cpu") as world:
        trainer = TrainerDDP(config=config, world=world)
        loaders = trainer.prepare_dataloaders(train_dataset=tiny.make_data(20), val_dataset=tiny.make_data(31, seed=1))
        try:
            trainer.run_training(*loaders[:2])
        except everyrank.ConfigError as error:
            return str(error)
    return ""


class Centred(nn.Module):
    """A mean that keeps a running centre and draws numbers: looking at it once more must leave no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, output: Tensor, data: Any) -> Tensor:
        """Return the mean squared error."""
        self.num_calls += 1
        return tiny.compute_loss(output, data) + 0 * torch.rand(())


def try_criteria(folder: Path, criteria: dict[str, Any]) -> dict[str, Any]:
    """Train for an epoch with each criterion; one that is refused gives its message."""
    found: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        for name, criterion in criteria.items():
            config = {**tiny.make_config(folder / name, num_epochs=1, dropout=0.2), "criterion": criterion}
            trainer = TrainerDDP(config=config, world=world)
            trainer.prepare_dataloaders(train_dataset=tiny.make_data(40))
            try:
                found[name] = tiny.outcome(trainer, trainer.run_training())
            except everyrank.ConfigError as error:
                found[name] = str(error)
        found["calls"] = int(criterion.num_calls) if isinstance(criterion, Centred) else 0
    return found


class NormImages(nn.Sequential):
    """With batch statistics over 2 x 2 values of each sample: one sample is enough."""

    def __init__(self) -> None:
        unflatten, flatten = nn.Unflatten(1, (1, 2, 2)), nn.Flatten()
        super().__init__(unflatten, nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), flatten, nn.Linear(8, 2))


def train_small_shares(folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train models with batch statistics on batches that may leave a rank one sample; tell the error and the steps."""
    found: dict[str, Any] = {}
    with everyrank.join(device="cpu") as world:
        for name, changes in variants.items():
            model, num_samples = changes.pop("model", NormNet), changes.pop("num_samples", 103)
            settings = {"num_epochs": 1, **changes}
            config = {**tiny.make_config(folder / name, **settings), "model": {"type": model}}
            trainer = TrainerDDP(config=config, world=world)
            loader, _, _ = trainer.prepare_dataloaders(train_dataset=tiny.make_data(num_samples))
            try:
                trainer.run_training(loader)
                found[name] = ("", trainer.step)
            except everyrank.ConfigError as error:
                found[name] = (str(error), trainer.step)
    return found
