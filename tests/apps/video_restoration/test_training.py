"""Schedules, freezing, tiling, weights and checkpoints, each on its own."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everyrank import ConfigError, SavedTraining, TrainerDDP, schema
from everyrank.apps.video_restoration.checkpoints import LegacyFiles, legacy_iterations, newest_legacy
from everyrank.apps.video_restoration.losses import RestorationLoss
from everyrank.apps.video_restoration.options.keys import TrainOptions
from everyrank.apps.video_restoration.options.loader import resolve
from everyrank.apps.video_restoration.tiling import ramp, restore_clip, starts
from everyrank.apps.video_restoration.training import OptionSchedule, build_network, learning_rate, trainer_config
from everyrank.apps.video_restoration.weights import load_weights

DEFAULTS: dict[str, Any] = schema.as_mapping(TrainOptions()) | {"G_scheduler_restart_weights": [1]}
VAL: dict[str, Any] = {
    "pad_seq": False,
    "flip_seq": False,
    "center_frame_only": False,
    "num_frame_testing": 0,
    "num_frame_overlapping": 2,
    "size_patch_testing": 0,
    "size_patch_overlapping": 5,
}


NETWORK: dict[str, Any] = {
    "img_size": [2, 40, 40],
    "window_size": [2, 4, 4],
    "depths": [2] * 8,
    "indep_reconsts": [7],
    "embed_dims": [8] * 8,
    "num_heads": [2] * 8,
    "deformable_groups": 2,
}


class Pair(nn.Module):
    """A network with a part called spynet."""

    def __init__(self) -> None:
        super().__init__()
        self.spynet = nn.Linear(2, 2)
        self.body = nn.Linear(2, 2)


def test_multistep_is_that_of_torch() -> None:
    train = {**DEFAULTS, "G_scheduler_type": "MultiStepLR", "G_scheduler_milestones": [3, 5], "G_scheduler_gamma": 0.1}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.1)
    for iteration in range(1, 8):
        optimizer.step()
        scheduler.step()
        assert learning_rate(1.0, iteration, train) == pytest.approx(scheduler.get_last_lr()[0])


def test_cosine_restarts_with_weights_and_a_floor() -> None:
    train = {
        **DEFAULTS,
        "G_scheduler_periods": [10, 20],
        "G_scheduler_restart_weights": [1, 0.5],
        "G_scheduler_eta_min": 0.01,
    }
    assert learning_rate(1.0, 5, train) == pytest.approx(0.01 + 0.5 * 0.99)
    assert learning_rate(1.0, 10, train) == pytest.approx(0.01)
    assert learning_rate(1.0, 11, train) == pytest.approx(0.01 + 0.25 * 0.99 * (1 + math.cos(math.pi / 20)))
    assert learning_rate(1.0, 30, train) == pytest.approx(0.01)
    assert learning_rate(1.0, 31, train) == pytest.approx(0.01)  # beyond the last period


def test_rates_are_those_of_the_iteration_also_after_going_on() -> None:
    """A resumed run has the rates that the options say now, whatever the checkpoint's optimizer held."""
    train = {**DEFAULTS, "G_scheduler_periods": [10]}
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]

    def make(rate: float) -> tuple[torch.optim.Optimizer, OptionSchedule]:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": rate / 4}]
        optimizer = torch.optim.Adam(groups, lr=rate)
        return optimizer, OptionSchedule(optimizer, train)

    optimizer, schedule = make(0.1)
    for iteration in range(1, 6):
        rates = [learning_rate(rate, iteration, train) for rate in (0.1, 0.025)]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
        optimizer.step()
        schedule.step()
    again, resumed = make(0.2)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    rates = [learning_rate(rate, 6, train) for rate in (0.2, 0.05)]
    assert [group["lr"] for group in again.param_groups] == pytest.approx(rates)


def test_a_fix_key_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'spynet'"):
        build_network(fix_keys=["spynett"], **NETWORK)


@pytest.mark.parametrize("kind", ["l1", "l2", "charbonnier", "ssim"])
def test_losses(kind: str) -> None:
    criterion = RestorationLoss(kind, 2.0, 1e-6)

    def loss(restored: torch.Tensor, sharp: torch.Tensor) -> torch.Tensor:
        return criterion(restored, {"H": sharp})

    sharp = torch.rand(2, 3, 3, 16, 16)
    restored = (sharp + 0.1).requires_grad_()
    expected = {"l1": 0.2, "l2": 0.02, "charbonnier": 2 * math.sqrt(0.01 + 1e-6)}
    value = loss(restored, sharp)
    value.backward()
    assert restored.grad is not None
    if kind == "ssim":
        assert 0 < value.item() < 1
        assert loss(sharp, sharp).item() == pytest.approx(0, abs=1e-5)
    else:
        assert value.item() == pytest.approx(expected[kind], rel=1e-4)


def test_parts_cover_a_clip() -> None:
    assert starts(10, 4, 1) == [0, 3, 6]
    assert starts(10, 12, 1) == [0]
    assert starts(5, 2, 9) == [0, 1, 2, 3]
    assert ramp(4, 2, first=True, last=False).tolist() == pytest.approx([1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("changes", [{}, {"num_frame_testing": 3}, {"size_patch_testing": 12}, {"pad_seq": True}])
def test_tiles_of_a_pointwise_network_blend_to_what_the_whole_gives(changes: dict[str, Any]) -> None:
    clip = torch.rand(7, 3, 20, 27)
    sizes = []

    def network(x: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(x.shape[-2:]))
        return (2 * x).repeat_interleave(2, -1).repeat_interleave(2, -2)

    val = {**VAL, **changes, **({"num_frame_testing": 3} if changes else {})}
    out = restore_clip(network, clip, val, scale=2, least=16)
    expected = (2 * clip).repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(out, expected)
    assert all(h % 8 == 0 and w % 8 == 0 and min(h, w) >= 16 for h, w in sizes)


def test_flipping_and_the_centre_frame() -> None:
    clip = torch.rand(5, 3, 16, 16)

    def sees_time(x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1]).view(1, -1, 1, 1, 1)

    out = restore_clip(sees_time, clip, {**VAL, "flip_seq": True}, scale=1, least=8)
    torch.testing.assert_close(out, clip + 4.5)  # frame t stands at t and at 9 - t
    out = restore_clip(sees_time, clip, {**VAL, "center_frame_only": True}, scale=1, least=8)
    torch.testing.assert_close(out, clip[2:3] + 2)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"params": s}, lambda s: {"params_ema": s, "params": {}}])
def test_published_forms_of_weights_load(tmp_path: Path, wrap: Any) -> None:
    source, target = Pair(), Pair()
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(source.body.weight, target.body.weight)


def test_weights_that_do_not_fit_are_refused_by_key(tmp_path: Path) -> None:
    state = Pair().state_dict()
    state["body.weight"] = torch.zeros(3, 2)
    state["extra"] = state.pop("spynet.bias")
    torch.save(state, tmp_path / "w.pth")
    network = Pair()
    with pytest.raises(ConfigError) as caught:
        load_weights(network, tmp_path / "w.pth")
    text = str(caught.value)
    for words in ("spynet.bias is missing", "extra is unknown", "body.weight is (3, 2) in the file and (2, 2)"):
        assert words in text
    load_weights(network, tmp_path / "w.pth", strict=False)
    assert torch.equal(network.spynet.weight, state["spynet.weight"])


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


def test_nothing_in_a_weights_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"params": Evil()}, tmp_path / "zip.pth")
    for name in ("w.pth", "zip.pth"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_weights(Pair(), tmp_path / name)
    assert not (tmp_path / "evil-was-here").exists()


class Saved(SavedTraining):
    """A checkpoint that is not on any disk."""

    def __init__(self, step: int, network: nn.Module) -> None:
        self.number, self.network = step, network

    @property
    def step(self) -> int:
        return self.number

    @property
    def model(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self.network.state_dict())

    @property
    def average(self) -> None:  # type: ignore[override]
        return None

    @property
    def optimizer(self) -> dict[str, Any]:  # type: ignore[override]
        return {"state": {}, "param_groups": []}


def test_the_newest_legacy_checkpoint_that_loads_is_found(tmp_path: Path) -> None:
    networks = {5: Pair(), 10: Pair(), 15: Pair(), 20: Pair()}
    for iteration, network in networks.items():
        LegacyFiles(tmp_path)(Saved(iteration, network))
    assert legacy_iterations(tmp_path) == [20, 15, 10, 5]
    whole = (tmp_path / "20_G.pth").read_bytes()
    (tmp_path / "20_G.pth").write_bytes(whole[: len(whole) // 2])  # cut short by a crash
    (tmp_path / "15_optimizerG.pth").write_bytes(b"")
    torch.save({"other": torch.zeros(1)}, tmp_path / "12_G.pth")
    found = newest_legacy(tmp_path, Pair())
    assert found is not None
    assert found.iteration == 10
    assert torch.equal(found.network["body.weight"], networks[10].body.weight)
    assert newest_legacy(tmp_path, Pair(), after=10) is None


def test_fixed_parts_are_frozen_first_and_then_trained_with_a_scaled_rate(tmp_path: Path) -> None:
    """What the options say of `fix_keys` and `E_decay`, done by the trainer."""
    train = {"fix_iter": 2, "fix_lr_mul": 0.25, "fix_keys": ["spynet"], "G_scheduler_type": None, "E_decay": 0.9}
    data = {"dataset_type": "VideoRecurrentTrainDataset", "dataroot_gt": "gt", "num_frame": 2}
    given = {"task": "t", "path": {"root": str(tmp_path)}, "datasets": {"train": data}}
    config = trainer_config(resolve({**given, "train": {**train, "G_optimizer_lr": 0.1, "total_iter": 4}}))
    found: list[Any] = []

    def keep(saved: SavedTraining) -> None:
        found.append((saved.model, saved.average, [group["lr"] for group in saved.optimizer["param_groups"]]))

    config["model"] = {"type": Pair}
    config["criterion"] = lambda output, data: output.square().mean()
    config["apply_model"] = lambda model, data: model.body(model.spynet(data[0]))
    config["training"] |= {"checkpoint_every_steps": 1, "after_save": keep, "plots": False, "progress": "off"}
    config["training"]["tracking"] = {"tensorboard": False}
    trainer = TrainerDDP(config=config)
    first = {name: value.clone() for name, value in trainer.module.state_dict().items()}
    trainer.prepare_dataloaders(train_dataset=torch.utils.data.TensorDataset(torch.ones(3, 2)))
    trainer.run_training()
    # the last step is saved when it is done, and once more with what ended the run
    models = [model for model, _, _ in found[:4]]
    assert all(rates == pytest.approx([0.1, 0.025]) for _, _, rates in found)
    weights = [first["spynet.weight"], *(model["spynet.weight"] for model in models)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])
    # Adam's first step is the learning rate, whatever the gradient: the frozen iterations left no state behind
    torch.testing.assert_close((weights[3] - weights[2]).abs(), torch.full((2, 2), 0.025), rtol=1e-3, atol=0)
    expected = 0.9 * first["body.weight"] + 0.1 * models[0]["body.weight"]
    torch.testing.assert_close(found[0][1]["body.weight"], expected)
