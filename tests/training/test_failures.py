"""What goes wrong on one rank ends all ranks, and the guilty one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numerics
import pytest
import tiny
import torch

import everyrank
from everyrank import TrainerDDP
from everyrank.errors import ConfigError, DataError, LaunchEnvironmentError, RankFailedError


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    results = everyrank.launch(tiny.train_poisoned, tmp_path, ["stop", "skip", "continue"], nproc_per_node=2)
    sampler = everyrank.GlobalBatchSampler(103, global_batch_size=10, rank=0, world_size=2, seed=42)
    shares = [
        list(sampler),
        list(everyrank.GlobalBatchSampler(103, global_batch_size=10, rank=1, world_size=2, seed=42)),
    ]
    guilty, batch = next((r, b) for r in (0, 1) for b, samples in enumerate(shares[r]) if 17 in samples)
    for result in results:  # every rank raises the same
        stop = result["stop"]
        assert (stop["rank"], stop["step"], list(stop["samples"])) == (guilty, batch + 1, shares[guilty][batch])
        assert f"loss is nan on rank {guilty} at epoch 0, step {batch + 1}, samples [" in stop["error"]
        assert (result["skip"]["step"], result["skip"]["num_updates"]) == (11, 10)
        assert all(value.isfinite().all() for value in result["skip"]["weights"].values())
        assert result["skip"]["training"][0]["loss"] == result["skip"]["training"][0]["loss"], "no NaN in the mean"
        assert not result["continue"]["weights"]["0.weight"].isfinite().all()
    for policy, words in (("skip", "step skipped"), ("continue", "going on")):
        log = (tmp_path / policy / "logs" / "rank-0.log").read_text()
        assert f"loss is nan on rank {guilty} at epoch 0, step {batch + 1}" in log
        assert log.count(words) == 1
    assert not list((tmp_path / "stop" / "checkpoints").glob("step-*")), "weights that are not finite are never saved"


@pytest.mark.parametrize(
    ("harmed", "after", "where"), [("training", 12, "epoch 0, step 3"), ("validation", 9, "batch 1")]
)
def test_a_dataset_that_raises_on_one_rank(tmp_path: Path, harmed: str, after: int, where: str) -> None:
    with pytest.raises(RankFailedError) as failure:
        everyrank.launch(tiny.train_with_harm, tmp_path, {"harmed": harmed}, 1, after, "raise", nproc_per_node=2)
    assert failure.value.rank == 1
    assert "cannot be read" in failure.value.traceback
    assert "on rank 1, epoch 0, " in failure.value.traceback
    assert where in failure.value.traceback
    assert "samples [" in failure.value.traceback
    assert "cannot be read" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


def test_mistakes_are_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    config = tiny.make_config(path)
    config["training"]["numepochs"] = 3
    config["validaton"] = {}
    with pytest.raises(ConfigError) as found:
        TrainerDDP(config=config)
    assert len(found.value.problems) == 2
    assert "training.numepochs: unknown key. Did you mean 'num_epochs'?" in str(found.value)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA GPU"):
            TrainerDDP(config=tiny.make_config(path, device="cuda"))
    with pytest.raises(LaunchEnvironmentError, match="initialize_ddp"):
        TrainerDDP(rank=1, config=tiny.make_config(path))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchEnvironmentError, match="has joined no process group"):
        TrainerDDP(config=tiny.make_config(path))
    assert not path.exists()


def test_data_that_is_missing_or_unknown(tmp_path: Path) -> None:
    trainer = TrainerDDP(config=tiny.make_config(tmp_path, num_epochs=1))
    with pytest.raises(DataError, match=r"prepare_dataloaders\(dataset=...\)(.|\n)*data: "):
        trainer.prepare_dataloaders()
    with pytest.raises(DataError, match="is empty"):
        trainer.prepare_dataloaders(tiny.make_data(0))
    with pytest.raises(DataError, match="without a GlobalBatchSampler"):
        trainer.run_training(torch.utils.data.DataLoader(tiny.make_data(), batch_size=4))
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(12))
    trainer.run_training()
    with pytest.raises(DataError, match="no test data"):
        trainer.run_test()


def test_parallel_is_required_for_several_processes(tmp_path: Path) -> None:
    def run(folder: Path) -> str:
        config = tiny.make_config(folder)
        del config["parallel"]
        with everyrank.join(device="cpu"):
            try:
                TrainerDDP(config=config)
            except ConfigError as error:
                return str(error)
        return ""

    assert all("no `parallel` section" in text for text in everyrank.launch(run, tmp_path, nproc_per_node=2))


def test_batch_statistics_of_one_sample_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """103 samples in global batches of 10: the last one leaves each of two ranks one or two samples."""
    variants: dict[str, dict[str, Any]] = {
        "short": {},
        "every": {"global_batch_size": 3},
        "dropped": {"drop_last": True},
        "not_reached": {"num_epochs": None, "num_steps": 10},
        "cured": {"global_batch_size": 11},
        "pixels": {"model": numerics.NormImages},
    }
    for found in everyrank.launch(numerics.train_small_shares, tmp_path, variants, nproc_per_node=2):
        told, step = found["short"]
        assert told.startswith(
            "BatchNorm1d '1' takes no statistics of one sample, but the epoch's last, short batch of 3"
        )
        assert "Fix: training.drop_last: true; or training.global_batch_size: 11, which" in told
        assert step == 0
        assert found["every"][0].startswith("BatchNorm1d '1' takes no statistics of one sample, but each batch of 3 ")
        assert {found[name] for name in ("dropped", "not_reached", "cured", "pixels")} == {("", 10), ("", 11)}


def bad_loss(output: torch.Tensor, data: Any) -> torch.Tensor:
    return (output - data[1]).square()


def test_a_criterion_that_is_no_mean_and_a_model_that_takes_another_form(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path)
    config["criterion"] = bad_loss
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(12))
    with pytest.raises(ConfigError, match=r"criterion returned a tensor of shape \(10, 2\)"):
        trainer.run_training()

    config = tiny.make_config(tmp_path / "b")
    config["model"] = {"type": torch.nn.Bilinear, "args": [4, 4, 2]}
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(12))
    with pytest.raises(TypeError) as found:
        trainer.run_training()
    assert any("set apply_model" in note for note in found.value.__notes__)
    assert any("on rank 0, epoch 0, step 1, samples [" in note for note in found.value.__notes__)
