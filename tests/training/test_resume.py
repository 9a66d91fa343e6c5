"""A run that is killed anywhere goes on as if nothing had happened."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import everyrank
from everyrank import TrainerDDP
from everyrank.errors import CheckpointError, RankFailedError
from everyrank.training.saving.ledger import read_ledger

# 3 epochs of 11 steps; a checkpoint every 4 steps, so that most lie in the middle of an epoch.
BASE: dict[str, Any] = {
    "checkpoint_every_steps": 4,
    "ledger": True,
    "keep_best": 0,
    "ema": {"decay": 0.9},
    "scheduler": {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 9}, "interval": "step"},
    "early_stopping": {"kwargs": {"patience": 50}},
}
WITH_DROPOUT = {**BASE, "dropout": 0.5}


def launch(folder: Path, changes: dict[str, Any], size: int, rank: int = 0, after: int = 0, harm: str = "none") -> Any:
    return everyrank.launch(tiny.train_with_harm, folder, changes, rank, after, harm, nproc_per_node=size)


def used_exactly_once(run: Path, num_samples: int = 103, num_epochs: int = 3) -> bool:
    counts = Counter((entry["epoch"], sample) for entry in read_ledger(run / "ledger") for sample in entry["samples"])
    return counts == Counter({(e, s): 1 for e in range(num_epochs) for s in range(num_samples)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The uninterrupted runs: with dropout on two ranks, and without on one."""
    folder = tmp_path_factory.mktemp("whole")
    return {"two": launch(folder / "two", WITH_DROPOUT, 2), "one": launch(folder / "one", BASE, 1)[0]}


def test_killed_twice_and_bitwise_the_uninterrupted_run(tmp_path: Path, whole: dict[str, Any]) -> None:
    for number, after in enumerate((70, 60)):
        with pytest.raises(RankFailedError) as failure:
            launch(tmp_path, WITH_DROPOUT, 2, rank=1 - number, after=after, harm="SIGKILL")
        assert failure.value.rank == 1 - number
        (tmp_path / "harmed").unlink()
    resumed = launch(tmp_path, WITH_DROPOUT, 2)
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    start = int(re.findall(r"Resuming from .* step (\d+)", log)[-1])
    assert start % 11, "the last start was in the middle of an epoch"
    for one, other in zip(whole["two"], resumed, strict=True):
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name])
        assert one["steps"] == other["steps"]
        assert [row["loss"] for row in one["validation"]] == [row["loss"] for row in other["validation"]]
        # nothing is read and thrown away: 5 samples a step, and 2 or 1 of the last step's 3
        used = start // 11 * 103 + start % 11 * 10
        assert sum(rank["num_read"] for rank in resumed) == 3 * 103 - used
    assert used_exactly_once(tmp_path / "run")
    assert not list((tmp_path / "run" / "ledger").glob("*.pending"))


def test_resumed_at_other_world_sizes_with_the_same_global_batches(tmp_path: Path, whole: dict[str, Any]) -> None:
    # batch_size is per rank; what was started with 2 ranks keeps 2 x 5 samples a step on 1 and 3 ranks.
    changes = {**BASE, "global_batch_size": None, "batch_size": 5}
    for size, after in ((2, 70), (1, 130)):
        with pytest.raises(RankFailedError):
            launch(tmp_path, changes, size, rank=0, after=after, harm="SIGKILL")
        (tmp_path / "harmed").unlink()
    resized = launch(tmp_path, changes, 3)[0]
    assert resized["step"] == whole["one"]["step"] == 33
    for (_, mine), (_, theirs) in zip(resized["steps"], whole["one"]["steps"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-10)
    for name, value in whole["one"]["weights"].items():
        torch.testing.assert_close(resized["weights"][name], value, rtol=0, atol=1e-10)
    assert used_exactly_once(tmp_path / "run")
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "World size changed from 1 to 3: the global batch stays 10, so each rank now takes 3 or 4 samples" in log


@pytest.mark.parametrize(
    ("harmed", "harm", "rank", "after", "num_workers"),
    [
        ("training", "SIGTERM", 1, 60, 0),
        ("validation", "SIGUSR1", 0, 2, 0),
        ("training", "group", 1, 70, 1),
    ],
)
def test_preempted_by_a_signal_to_one_rank(
    tmp_path: Path, whole: dict[str, Any], harmed: str, harm: str, rank: int, after: int, num_workers: int
) -> None:
    changes = {**WITH_DROPOUT, "harmed": harmed, "num_workers": num_workers}
    stopped = launch(tmp_path, changes, 2, rank=rank, after=after, harm=harm)
    signal_name = "SIGTERM" if harm == "group" else harm
    assert all(signal_name in result["preempted"] for result in stopped)
    assert stopped[0]["step"] == stopped[1]["step"]
    newest = max(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert newest == f"step-{stopped[0]['step']:08d}"
    assert max(entry["step"] for entry in read_ledger(tmp_path / "run" / "ledger")) == stopped[0]["step"]
    resumed = launch(tmp_path, changes, 2)
    for name, value in whole["two"][0]["weights"].items():
        assert torch.equal(value, resumed[0]["weights"][name])
    assert whole["two"][0]["steps"] == resumed[0]["steps"]
    assert used_exactly_once(tmp_path / "run")


def single(path: Path, **changes: Any) -> TrainerDDP:
    trainer = TrainerDDP(config=tiny.make_config(path, **changes))
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(23), val_dataset=tiny.make_data(7))
    trainer.run_training()
    return trainer


def test_auto_never_and_a_path(tmp_path: Path) -> None:
    first = single(tmp_path / "a", num_epochs=2, checkpoint_at=1, keep_best=0)
    again = single(tmp_path / "a", num_epochs=2)
    assert (again.epoch, again.step) == (first.epoch, first.step)
    assert again.history.training() == first.history.training()

    longer = single(tmp_path / "a", num_epochs=3)
    assert longer.epoch == 3
    assert len(longer.history.validation()) == 3

    middle = str(tmp_path / "a" / "checkpoints" / "step-00000003")
    back = single(tmp_path / "a", num_epochs=3, resume=middle)
    assert torch.equal(tiny.weights(back)["0.weight"], tiny.weights(longer)["0.weight"])
    assert (tmp_path / "a" / "unused-step-00000009").is_dir()

    elsewhere = single(tmp_path / "b", num_epochs=3, resume=middle)
    assert torch.equal(tiny.weights(elsewhere)["0.weight"], tiny.weights(longer)["0.weight"])
    assert [row["epoch"] for row in elsewhere.history.training()] == [0, 1, 2]

    anew = single(tmp_path / "a", num_epochs=1, resume="never")
    assert anew.step == 3
    assert (tmp_path / "a" / "previous-1" / "checkpoints" / "step-00000009").is_dir()


def test_a_checkpoint_that_does_not_fit_says_so(tmp_path: Path) -> None:
    single(tmp_path, num_epochs=1)
    config = tiny.make_config(tmp_path)
    config["model"] = {"type": torch.nn.Linear, "args": [4, 2]}
    with pytest.raises(CheckpointError, match=r"does not fit the configured model(.|\n)*resume: never"):
        TrainerDDP(config=config)


def test_reloading_for_inference_in_one_line(tmp_path: Path) -> None:
    trainer = single(tmp_path, num_epochs=3, ema={"decay": 0.5})
    model = TrainerDDP.load_model(tmp_path)
    assert not model.training
    assert isinstance(model, tiny.TinyNet), "built from the run's own configuration"
    for name, value in trainer.ema.average.items():
        assert torch.equal(model.state_dict()[name], value)
    raw = TrainerDDP.load_model(tmp_path, tiny.TinyNet().double(), which="best", average=False)
    assert set(raw.state_dict()) == {"0.weight", "0.bias", "3.weight", "3.bias"}, "no `module.` prefix of DDP"


def test_saving_by_hand(tmp_path: Path) -> None:
    trainer = TrainerDDP(config=tiny.make_config(tmp_path, num_epochs=1))
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(23))
    assert trainer.save_checkpoint().name == "step-00000000"
    assert (tmp_path / "checkpoints" / "step-00000000" / "manifest.json").is_file()


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(30))
def test_killed_at_random_and_resized(tmp_path: Path, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    (whole,) = launch(tmp_path / "whole", BASE, 1)
    folder = tmp_path / "killed"
    folder.mkdir()
    for size in (2, 1, 3):
        harmed = ("training", "validation")[draw(0, 1)]
        try:
            changes = {**BASE, "harmed": harmed}
            launch(folder, changes, size, rank=draw(0, size - 1), after=draw(1, 200 // size), harm="SIGKILL")
        except RankFailedError:
            (folder / "harmed").unlink()
    final = launch(folder, BASE, 2)
    for name, value in whole["weights"].items():
        torch.testing.assert_close(final[0]["weights"][name], value, rtol=0, atol=1e-10)
    assert used_exactly_once(folder / "run")
