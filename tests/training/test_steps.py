"""Runs of so many steps, validated between them; parameter groups; parts frozen at first; a hook after each save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import everyrank
from everyrank import TrainerDDP
from everyrank.data.permutation import GlobalPermutation
from everyrank.errors import CheckpointError, ConfigError, RankFailedError
from everyrank.training.config import read_config
from everyrank.training.seeding import seed_everywhere
from everyrank.training.tracking.history import read_history

TOLERANCE = 1e-10
NUM_STEPS = 27  # epochs have 11 steps: two of them and a half
CHANGES: dict[str, Any] = {
    "num_epochs": None,
    "num_steps": NUM_STEPS,
    "validation": {"batch_size": 7, "every_n_steps": 4, "metrics": {"error": tiny.mean_error}},
    "parameter_groups": [{"match": ["3"], "optimizer_kwargs": {"lr": 0.02, "momentum": 0.5}}],
    "frozen": [{"match": ["0.w*"], "until_step": 5}, {"select": tiny.is_bias, "until_step": 9}],
    "clip_grad_norm": 0.1,
    "ema": {"decay": 0.9},
    "scheduler": {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 6}, "interval": "step"},
    "checkpoint_every_steps": 5,
    "keep_last": 20,
    "keep_best": 0,
    "after_save": tiny.note_save,
}
SAVED = [5, 10, 15, 20, 25, NUM_STEPS]


def launch(folder: Path, size: int, rank: int = 0, after: int = 0, harm: str = "none", **changes: Any) -> Any:
    given = (folder, {**CHANGES, **changes}, rank, after, harm)
    return everyrank.launch(tiny.train_with_harm, *given, nproc_per_node=size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Any]]:
    folders = {size: tmp_path_factory.mktemp(f"whole{size}") for size in (1, 2, 3)}
    return {size: (folder / "run", launch(folder, size)[0]) for size, folder in folders.items()}


def _batches() -> list[torch.Tensor]:
    """The global batches of three epochs: 11 an epoch, the last short."""
    permutation = GlobalPermutation(103, seed=42)
    return [rows for epoch in range(3) for rows in torch.from_numpy(permutation.indices(epoch, 0, 103)).split(10)]


def plain_pytorch() -> tuple[list[float], list[float], list[dict[str, torch.Tensor]]]:
    """The same training by hand, frozen parts frozen by ``requires_grad``: losses, validations, averages."""
    seed_everywhere(42)
    model = tiny.TinyNet().double()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.02, "momentum": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=6)
    (x, y), (x_val, y_val) = tiny.make_data().tensors, tiny.make_data(53, seed=1).tensors
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses, validations, averages = [], [], []
    for step, rows in zip(range(NUM_STEPS), _batches(), strict=False):
        model[0].weight.requires_grad_(step >= 5)
        for layer in (0, 3):
            model[layer].bias.requires_grad_(step >= 9)
        loss = nn.functional.mse_loss(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        average = {name: 0.9 * average[name] + 0.1 * value for name, value in model.state_dict().items()}
        averages.append(average)
        if (step + 1) % 4 == 0 or step + 1 == NUM_STEPS:
            output = torch.func.functional_call(model, average, x_val)
            validations.append(nn.functional.mse_loss(output, y_val).item())
    return losses, validations, averages


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_run_is_that_of_plain_pytorch(whole: Any, size: int) -> None:
    run, found = whole[size]
    losses, validations, averages = plain_pytorch()
    assert (found["step"], found["epoch"]) == (NUM_STEPS, 2)
    assert [loss for _, loss in found["steps"]] == pytest.approx(losses, abs=TOLERANCE)
    assert [row["step"] for row in found["validation"]] == [4, 8, 12, 16, 20, 24, NUM_STEPS]
    assert [row["loss"] for row in found["validation"]] == pytest.approx(validations, abs=TOLERANCE)
    assert [(row["epoch"], row["step"]) for row in found["training"]] == [(0, 11), (1, 22), (2, NUM_STEPS)]
    assert found["training"][-1]["loss"] == pytest.approx(sum(losses[22:]) / 5, abs=TOLERANCE)
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:08d}" for step in SAVED]
    for step in SAVED:
        noted = json.loads((run / f"after-{step}.json").read_text())
        assert noted["average"] == pytest.approx(averages[step - 1]["0.weight"].sum().item(), abs=TOLERANCE)
        assert noted["num_groups"] == 2
    assert noted["model"] == pytest.approx(found["weights"]["0.weight"].sum().item())


def test_killed_while_parts_are_frozen_and_bitwise_the_uninterrupted_run(tmp_path: Path, whole: Any) -> None:
    for after in (35, 60):  # in step 8, whose checkpoint before is at 5; and after all is thawed
        with pytest.raises(RankFailedError):
            launch(tmp_path, 2, rank=1, after=after, harm="SIGKILL")
        (tmp_path / "harmed").unlink()
    resumed = launch(tmp_path, 2)[0]
    run, uninterrupted = whole[2]
    for name, value in uninterrupted["weights"].items():
        assert torch.equal(resumed["weights"][name], value)
    assert resumed["steps"] == uninterrupted["steps"]
    assert _without_seconds(tmp_path / "run") == _without_seconds(run)


def test_more_steps_go_on_in_the_middle_of_the_epoch(tmp_path: Path, whole: Any) -> None:
    launch(tmp_path, 2, num_steps=13)
    again = launch(tmp_path, 2, num_steps=13)[0]
    assert [row["step"] for row in again["training"]] == [11, 13]
    longer = launch(tmp_path, 2)[0]
    run, uninterrupted = whole[2]
    for name, value in uninterrupted["weights"].items():
        assert torch.equal(longer["weights"][name], value)
    rows = [row for row in _without_seconds(tmp_path / "run") if row.get("step") != 13 or row["kind"] == "step"]
    assert rows == _without_seconds(run)


def _without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_history(run / "history.jsonl")]


def test_a_signal_in_a_validation_between_steps_does_not_lose_it(tmp_path: Path, whole: Any) -> None:
    changes = {"harmed": "validation"}
    stopped = launch(tmp_path, 2, rank=1, after=30, harm="SIGTERM", **changes)
    assert stopped[0]["step"] == 8
    assert "SIGTERM" in stopped[1]["preempted"]
    resumed = launch(tmp_path, 2, **changes)[0]
    assert [row["loss"] for row in resumed["validation"]] == [row["loss"] for row in whole[2][1]["validation"]]


def test_early_stopping_and_plateaus_count_validations(tmp_path: Path) -> None:
    config = tiny.make_config(
        tmp_path,
        num_epochs=None,
        num_steps=500,
        validation={"every_n_steps": 2},
        early_stopping={"kwargs": {"patience": 3, "delta": 10.0}},
        scheduler={"type": torch.optim.lr_scheduler.ReduceLROnPlateau, "kwargs": {"patience": 0, "threshold": 10.0}},
    )
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(), val_dataset=tiny.make_data(9))
    _, validation = trainer.run_training()
    assert [row["step"] for row in validation] == [2, 4, 6, 8]
    assert trainer.step == 8
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**4)
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(), val_dataset=tiny.make_data(9))
    trainer.run_training()
    assert trainer.step == 8


def fail(saved: Any) -> None:
    raise OSError(f"no room for step {saved.step}")


def test_a_hook_that_fails_ends_the_run_with_the_checkpoint_whole(tmp_path: Path) -> None:
    trainer = TrainerDDP(config=tiny.make_config(tmp_path, num_epochs=1, after_save=fail))
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(23))
    with pytest.raises(CheckpointError, match=r"step-00000003 is saved, but .* OSError: no room for step 3"):
        trainer.run_training()
    assert (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"num_steps": 5}, "give either num_epochs .* or num_steps .* but both was found"),
        ({"num_epochs": None}, "but neither was found"),
        ({"frozen": [{"match": ["0"], "until_stp": 3}]}, r"frozen\.0\.until_stp: unknown key\. .*'until_step'"),
        ({"validation": {"every": 2, "every_n_steps": 3}}, "every 2 .* and every_n_steps 3"),
    ],
)
def test_contradictions_are_said(training: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config(tiny.make_config(tmp_path, **training))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"match": ["4.weight"]}, r"parameter_groups\.0\.match: no trainable parameter's name fits '4\.weight'"),
        ({"match": ["*weigth"]}, "Did you mean 'weight'"),
        ({"match": ["0"], "select": tiny.is_bias}, "give either match"),
        ({"select": lambda name, parameter: False}, "chose none of the 4 trainable parameters"),
    ],
)
def test_groups_that_name_nothing_are_said(section: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainerDDP(config=tiny.make_config(tmp_path, parameter_groups=[section]))


def test_every_sample_is_predicted_once_at_every_world_size(tmp_path: Path) -> None:
    found = {n: everyrank.launch(tiny.predict, tmp_path / str(n), nproc_per_node=n) for n in (1, 3)}
    model = tiny.TinyNet().double()
    model.load_state_dict(found[1][0]["average"])
    for results in found.values():
        for result in results:
            for size, answers in zip((11, 2), result["plain"], strict=True):
                torch.testing.assert_close(answers, model(tiny.make_data(size).tensors[0]).detach())
            assert torch.equal(result["mapped"]["x"], tiny.make_data(7).tensors[0])
            torch.testing.assert_close(result["mapped"]["y"], model(result["mapped"]["x"])[:, 0].detach())


def test_another_programs_state_is_gone_on_from(tmp_path: Path) -> None:
    """Its 14 steps and 8 more of ours are the 22 steps of one program."""
    whole = tiny.start_from(tmp_path / "whole", 0, {"model": _first()})
    model, optimizer = _by_hand(14)
    for size in (1, 2):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        found = everyrank.launch(tiny.start_from, tmp_path / str(size), 14, state, nproc_per_node=size)[0]
        assert [loss for _, loss in found["steps"]] == pytest.approx(
            [loss for _, loss in whole["steps"][14:]], abs=TOLERANCE
        )
        for name, value in whole["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=TOLERANCE)


def _first() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return tiny.TinyNet().double().state_dict()


def _by_hand(num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny.TinyNet().double()
    model.load_state_dict(_first())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.5)
    x, y = tiny.make_data().tensors
    for rows in _batches()[:num_steps]:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer
