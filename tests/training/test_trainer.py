"""What a person configures, hands over and sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import everyrank
from everyrank import DefaultValidator, TrainerDDP
from everyrank.config.yaml_loader import read_yaml
from everyrank.training.config import read_config


class ListOf(torch.utils.data.Dataset):
    """Samples in a list."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def rows(num: int = 30) -> list[tuple[Tensor, Tensor]]:
    x, y = tiny.make_data(num).tensors
    return [(x[i].float(), y[i].float()) for i in range(num)]


class TakesGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, data: Any) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        return global_mean_pool(self.layer(data.x), data.batch)


class TakesNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x) * scale


def graphs() -> list[Any]:
    geometric = pytest.importorskip("torch_geometric.data")
    edges = torch.tensor([[0, 1], [1, 0]])
    return [geometric.Data(x=x.repeat(2 + i % 3, 1), edge_index=edges, y=y[None]) for i, (x, y) in enumerate(rows())]


FORMS: dict[str, tuple[Any, Any, Any, Any]] = {
    "tuple": (lambda: rows(), tiny.TinyNet, lambda o, d: nn.functional.mse_loss(o, d[1]), None),
    "tensor": (
        lambda: [torch.cat(row) for row in rows()],
        tiny.TinyNet,
        lambda o, d: nn.functional.mse_loss(o, d[:, 4:]),
        lambda model, data: model(data[:, :4]),
    ),
    "dict by name": (
        lambda: [{"x": x, "y": y, "other": 1} for x, y in rows()],
        TakesNames,
        lambda o, d: nn.functional.mse_loss(o, d["y"]),
        None,
    ),
    "graph": (graphs, TakesGraph, lambda o, d: nn.functional.mse_loss(o, d.y), None),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form(tmp_path: Path, form: str) -> None:
    samples, model, criterion, apply_model = FORMS[form]
    data = ListOf(samples())
    config = tiny.make_config(tmp_path, dtype=None, global_batch_size=7)
    config.update(criterion=criterion, apply_model=apply_model, model={"type": model})
    if form != "tensor":
        config["validation"] = {"batch_size": 4, "metrics": {"mse": {"type": "MeanSquaredError"}}}
    else:
        config["validation"] = {"batch_size": 4}
    trainer = TrainerDDP(config=config)
    train_loader, val_loader, _ = trainer.prepare_dataloaders(train_dataset=data, val_dataset=data)
    training, validation = trainer.run_training(train_loader, val_loader)
    assert training[-1]["loss"] < training[0]["loss"]
    last = trainer.validator.result
    assert last is not None
    assert last.std_over == "samples"
    assert last.loss_std > 0
    if "mse" in last.metrics:
        assert last.metrics["mse"] == pytest.approx(last.loss, rel=1e-5)
    assert validation[-1]["num_samples"] == 30


def test_ranks_without_validation_data_and_splits_that_agree(tmp_path: Path) -> None:
    results = everyrank.launch(tiny.rank0_validation_and_splits, tmp_path, nproc_per_node=3)
    assert all(result["split"] == results[0]["split"] for result in results)
    train, val, test = map(set, results[0]["split"])
    assert train | val | test == set(range(50)), "together they are all samples"
    assert len(train) + len(val) + len(test) == 50, "none is in two parts"
    assert [row["num_samples"] for row in results[2]["validation"]] == [5]
    assert results[1]["validation"] == results[0]["validation"]
    files = {path.name for path in (tmp_path / "checkpoints").glob("*/*")}
    assert files == {"manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"}, "no pickle"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"rank-{rank}.log" for rank in range(3)]


def test_the_run_folder_and_the_log(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path, plots=True, tracking={"tensorboard": True})
    trainer = TrainerDDP(config=config)
    train_loader, val_loader, test_loader = trainer.prepare_dataloaders(tiny.make_data(2000), split=[0.8, 0.1, 0.1])
    trainer.run_training(train_loader, val_loader)
    result = trainer.run_test(test_loader)
    assert result.num_samples == 200
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {".in-use", "config.yaml", "history.jsonl", "curves.png", "checkpoints", "logs", "tensorboard"}
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    for line in (
        r"^\[RANK 0\] \d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO [\w.]+: Training set size: 1,600$",
        r"INFO [\w.]+: Validation: loss=0\.\d+ ± 0\.\d+, error=0\.\d+$",
        r"INFO [\w.]+: Test: loss=0\.\d+ ± 0\.\d+",
    ):
        assert re.search(line, log, re.MULTILINE), line
    table = trainer.validator.report()
    assert table.splitlines()[0] == "Validation"
    assert re.search(r"samples +200\b", table)
    assert read_config(read_yaml(tmp_path / "config.yaml")).training == trainer.config.training

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss_step")) == 480
    assert [event.step for event in events.Scalars("val/loss")] == [160, 320, 480]


class Half(DefaultValidator):
    """A validator with another loss and a note of its own."""

    def __init__(self, *args: Any, factor: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def compute_batch(self, model: nn.Module, data: Any) -> tuple[Any, Tensor]:
        output, loss = super().compute_batch(model, data)
        return output, loss * self.factor


def test_a_subclassed_validator_and_data_from_the_configuration(tmp_path: Path) -> None:
    losses = {}
    for name, section in (("own", {"type": Half, "kwargs": {"factor": 0.5}}), ("default", {})):
        config = tiny.make_config(tmp_path / name, num_epochs=2)
        config["validation"] = {"validator": {**section, "device": "cpu"}, "every": 2}
        config["data"] = {"type": tiny.make_data, "kwargs": {"num_samples": 60}, "split": [0.5, 0.25, 0.25]}
        trainer = TrainerDDP(rank=0, config=config)
        training, validation = trainer.run_training()
        assert (len(training), [row["epoch"] for row in validation]) == (2, [1])
        losses[name] = trainer.validator.result
        assert trainer.run_test().num_samples == 15
    assert losses["own"].loss == pytest.approx(losses["default"].loss / 2)
    assert losses["own"].std_over == "batches", "its loss is no longer the criterion's mean over the samples"


def test_a_graph_network_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    config = tiny.make_config(tmp_path, dtype=None, num_epochs=1)
    config["criterion"] = FORMS["graph"][2]
    config["model"] = {"type": "GNNModel", "in_dim": 4, "blocks": [{"out_dim": 8}], "heads": {"y": {"out_dim": 2}}}
    config["validation"] = {}
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=ListOf(graphs()))
    trainer.run_training()
    assert type(TrainerDDP.load_model(tmp_path)).__name__ == "GNNModel"

    config["model"]["bloks"] = []
    config["training"]["path"] = str(tmp_path / "wrong")
    with pytest.raises(everyrank.ConfigError, match="bloks"):
        TrainerDDP(config=config)
    assert not (tmp_path / "wrong").exists()


def test_until_an_epoch_and_on(tmp_path: Path) -> None:
    trainers = [TrainerDDP(config=tiny.make_config(tmp_path / name, dropout=0.5)) for name in "ab"]
    for trainer in trainers:
        loader, _, _ = trainer.prepare_dataloaders(train_dataset=tiny.make_data(30))
        if trainer is trainers[0]:
            trainer.run_training(loader)
    torch.manual_seed(0)
    loader, _, _ = trainers[1].prepare_dataloaders(train_dataset=tiny.make_data(30))
    trainers[1].run_training(loader, until_epoch=1)
    assert trainers[1].epoch == 1
    trainers[1].run_training(loader)
    for name, value in tiny.weights(trainers[0]).items():
        assert torch.equal(value, tiny.weights(trainers[1])[name])
