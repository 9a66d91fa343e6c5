"""One, two and three ranks take the same optimizer steps, those of plain PyTorch in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numerics
import pytest
import tiny
import torch

import everyrank
from everyrank.data.permutation import GlobalPermutation
from everyrank.training.seeding import seed_everywhere

TOLERANCE = 1e-10
STEP_LR = {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 7, "gamma": 0.5}, "interval": "step"}
VARIANTS: dict[str, dict[str, Any]] = {
    # 103 samples in batches of 10: the last is short, and 10 does not divide by 3. 50 steps and more.
    "plain": {"num_epochs": 5},
    # with nothing asked for, a step takes a shorter way
    "bare": {"num_epochs": 2, "dtype": None, "model": {"type": tiny.DoubleNet}},
    "drop_last": {"num_epochs": 1, "drop_last": True},
    "accumulated": {"num_epochs": 2, "accumulation_steps": 4},
    "options": {
        "num_epochs": 2,
        "scheduler": STEP_LR,
        "clip_grad_norm": 0.1,
        "clip_grad_value": 0.05,
        "ema": {"decay": 0.9, "start_step": 3},
        "nan_policy": "skip",
        "optimizer_type": torch.optim.AdamW,
        "optimizer_kwargs": {"lr": 0.01},
    },
    "rank0": {"num_epochs": 2, "validation": {"batch_size": 7, "on": "rank0", "metrics": {"error": tiny.mean_error}}},
    "workers": {"num_epochs": 2, "num_workers": 1, "prefetch_factor": 3},
    # fewer samples than three ranks: some rank never has one
    "few": {"num_epochs": 4, "num_samples": 2},
    "torchmetrics": {
        "num_epochs": 1,
        "validation": {
            "batch_size": 1,
            "metrics": {
                "mse": {"type": "MeanSquaredError"},
                "r2": {"type": "R2Score", "kwargs": {"multioutput": "uniform_average"}},
            },
        },
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every rank of every world size returned for every variant."""
    folder = tmp_path_factory.mktemp("exactness")
    return {size: everyrank.launch(tiny.train, folder / str(size), VARIANTS, nproc_per_node=size) for size in (1, 2, 3)}


def plain_pytorch(num_epochs: int, accumulation: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train as anybody would without any package; only the order of samples is ours."""
    seed_everywhere(42)
    model = tiny.TinyNet().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = tiny.make_data().tensors
    losses = []
    for epoch in range(num_epochs):
        order = torch.from_numpy(GlobalPermutation(103, seed=42).indices(epoch, 0, 103))
        for rows in order.split(10 * accumulation):
            loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("variant", "accumulation"), [("plain", 1), ("bare", 1), ("accumulated", 4)])
def test_the_curve_is_that_of_plain_pytorch(results: Any, size: int, variant: str, accumulation: int) -> None:
    found = results[size][0][variant]
    losses, state = plain_pytorch(VARIANTS[variant]["num_epochs"], accumulation)
    assert [step for step, _ in found["steps"]] == list(range(1, len(losses) + 1))
    assert [loss for _, loss in found["steps"]] == pytest.approx(losses, abs=TOLERANCE)
    for name, value in state.items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_world_size_gives_the_same(results: Any, variant: str) -> None:
    one = results[1][0][variant]
    assert one["validation"], "nothing was validated"
    for size in (2, 3):
        for rank in range(size):
            found = results[size][rank][variant]
            assert found["step"] == one["step"]
            for mine, theirs in zip(
                found["training"] + found["validation"], one["training"] + one["validation"], strict=True
            ):
                mine, theirs = ({k: v for k, v in row.items() if "seconds" not in k} for row in (mine, theirs))
                assert mine == pytest.approx(theirs, abs=TOLERANCE)
            for name, value in one["weights"].items():
                torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=TOLERANCE)


def test_validation_counts_each_sample_once_with_its_own_spread(results: Any) -> None:
    state = results[3][0]["plain"]["weights"]
    model = tiny.TinyNet().double()
    model.load_state_dict(state)
    x, y = tiny.make_data(53, seed=1).tensors
    losses = (model(x) - y).square().mean(dim=1)
    last = results[3][0]["plain"]["validation"][-1]
    assert last["num_samples"] == 53
    assert last["loss"] == pytest.approx(losses.mean().item(), abs=TOLERANCE)
    assert last["loss_std"] == pytest.approx(losses.std(correction=0).item(), abs=TOLERANCE)
    assert last["error"] == pytest.approx((model(x) - y).abs().mean().item(), abs=TOLERANCE)


def test_the_scheduler_steps_once_per_optimizer_step(results: Any) -> None:
    for size in (1, 2, 3):
        found = results[size][0]["options"]
        assert found["step"] == 22
        assert found["training"][-1]["lr"] == pytest.approx(0.01 * 0.5 ** (22 // 7))


def test_epoch_loss_is_the_mean_over_samples(results: Any) -> None:
    losses = [loss for _, loss in results[2][0]["plain"]["steps"][:11]]
    counts = [10] * 10 + [3]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / 103
    assert results[2][1]["plain"]["training"][0]["loss"] == pytest.approx(mean, abs=TOLERANCE)


def test_each_epoch_reads_every_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    ranks = everyrank.launch(tiny.train_and_note_samples, tmp_path, nproc_per_node=2)
    first, second = ([sorted(rank[epoch]) for rank in ranks] for epoch in (0, 1))
    for epoch in (first, second):
        assert sorted(epoch[0] + epoch[1]) == list(range(20))
    assert [rank[0] for rank in ranks] != [rank[1] for rank in ranks]
    assert first != second  # with set_epoch forgotten each rank would read its old share again


def test_models_start_equal_and_ranks_draw_their_own_randomness(tmp_path: Path) -> None:
    def initial(folder: Path) -> dict[str, Any]:
        with everyrank.join(device="cpu"):
            trainer = everyrank.TrainerDDP(config=tiny.make_config(folder / "run", dropout=0.5))
            assert trainer.epoch == 0
            before = tiny.weights(trainer)
            trainer.prepare_dataloaders(train_dataset=tiny.make_data(20))
            trainer.run_training()
            return {"before": before, "after": tiny.weights(trainer), "draw": torch.rand(1).item()}

    first, second = everyrank.launch(initial, tmp_path, nproc_per_node=2)
    for stage in ("before", "after"):
        for name, value in first[stage].items():
            assert torch.equal(value, second[stage][name])
    assert first["draw"] != second["draw"]


def test_augmentation_is_the_same_on_any_rank_and_in_any_worker(tmp_path: Path) -> None:
    (alone,) = everyrank.launch(numerics.train_augmented, tmp_path / "1", [0, 2], nproc_per_node=1)
    (shared, _) = everyrank.launch(numerics.train_augmented, tmp_path / "2", [0, 2], nproc_per_node=2)
    for found in (alone[2], *shared.values()):
        for key in ("training", "validation"):
            losses = [[row["loss"] for row in result[key]] for result in (alone[0], found)]
            assert losses[1] == pytest.approx(losses[0], abs=TOLERANCE)
        for name, value in alone[0]["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=TOLERANCE)
