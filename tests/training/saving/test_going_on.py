"""Saving, failing and going on in orders that a person may choose: no sample twice, no best lost, none damaged kept."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import alone
import pytest
import tiny
import torch

import everyrank
from everyrank import TrainerDDP
from everyrank.errors import ConfigError, DataError, UserError
from everyrank.training.saving.ledger import read_ledger


def make(folder: Path, **changes: Any) -> TrainerDDP:
    config = tiny.make_config(folder, **{"num_epochs": 2, "checkpoint_every_steps": 2, "ledger": True, **changes})
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(43), val_dataset=tiny.make_data(9))
    return trainer


def counts(folder: Path) -> Counter[int]:
    entries = read_ledger(folder / "ledger")
    uses = Counter((entry["epoch"], sample) for entry in entries for sample in entry["samples"])
    return Counter(uses.values())


class Breaks(torch.utils.data.Dataset):
    """Data in which the n-th sample that is read raises, once."""

    def __init__(self, after: int) -> None:
        self.after, self.num_read, self.data = after, 0, tiny.make_data(43)

    def __len__(self) -> int:
        return 43

    def __getitem__(self, index: int) -> Any:
        self.num_read += 1
        if self.num_read == self.after:
            raise OSError("this file cannot be read")
        return self.data[index]


def test_a_checkpoint_saved_right_after_a_resume_keeps_the_cursor(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", dropout=0.5)
    whole.run_training()
    broken = make(tmp_path / "run", dropout=0.5)
    broken.prepare_dataloaders(train_dataset=Breaks(35), val_dataset=tiny.make_data(9))
    with pytest.raises(OSError, match="cannot be read"):
        broken.run_training()
    resumed = make(tmp_path / "run", dropout=0.5)
    assert resumed.step == 2
    resumed.save_checkpoint()
    again = make(tmp_path / "run", dropout=0.5)
    again.run_training()
    assert counts(tmp_path / "run") == {1: 86}
    for name, value in tiny.weights(whole).items():
        assert torch.equal(value, tiny.weights(again)[name])


def test_a_trainer_that_failed_does_not_go_on_and_a_new_one_does(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    data = Breaks(35)
    loaders = trainer.prepare_dataloaders(train_dataset=data, val_dataset=tiny.make_data(9))
    with pytest.raises(OSError, match="cannot be read"):
        trainer.run_training(*loaders[:2])
    for call in (lambda: trainer.run_training(*loaders[:2]), trainer.save_checkpoint):
        with pytest.raises(UserError, match=r"failed in the middle of a step .OSError: this file cannot be read"):
            call()
    make(tmp_path).run_training()
    assert counts(tmp_path) == {1: 86}


def test_another_loader_in_the_middle_of_an_epoch_goes_on_at_the_cursor(tmp_path: Path) -> None:
    trainer = make(tmp_path, num_epochs=None, num_steps=3)
    trainer.run_training()
    longer = make(tmp_path, num_epochs=2, checkpoint_every_steps=1)
    longer.save_checkpoint()
    loader, _, _ = longer.prepare_dataloaders(train_dataset=tiny.make_data(43))
    longer.run_training(loader)
    assert counts(tmp_path) == {1: 86}


def test_a_checkpoint_saved_after_training_stays_the_best(tmp_path: Path) -> None:
    trainer = make(tmp_path, keep_last=2, keep_best=2, optimizer_kwargs={"lr": 0.01})
    trainer.run_training()
    kept = everyrank.Checkpointer(tmp_path / "checkpoints", world=trainer.world, prepare=False)
    ranked = kept.best()
    assert ranked is not None
    assert (ranked.step, ranked.metric) == (trainer.step, trainer.history.validation()[-1]["loss"])
    trainer.save_checkpoint()
    make(tmp_path, keep_last=2, keep_best=2, optimizer_kwargs={"lr": 0.01}).save_checkpoint()
    assert kept.best().metric == ranked.metric


def test_a_damaged_checkpoint_is_set_aside_and_good_ones_are_kept(tmp_path: Path) -> None:
    make(tmp_path, num_epochs=1, keep_last=3, keep_best=0).run_training()
    checkpoints = tmp_path / "checkpoints"
    newest = max(path for path in checkpoints.iterdir() if path.name.startswith("step-"))
    (newest / "model.safetensors").write_bytes(b"damaged")
    longer = make(tmp_path, num_epochs=2, keep_last=1, keep_best=0)
    assert longer.step == 4
    assert (checkpoints / f"damaged-{newest.name}").is_dir()
    longer.run_training()
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000010", f"damaged-{newest.name}"}


def test_of_two_trainers_in_a_process_the_one_that_was_overtaken_does_not_write(tmp_path: Path) -> None:
    first, reader = make(tmp_path), make(tmp_path)
    first.run_training(until_epoch=1)
    second = make(tmp_path)
    assert second.step == first.step > reader.step
    first.save_checkpoint()
    make(tmp_path).run_training()
    for trainer in (first, second, reader):
        for call in (trainer.run_training, trainer.save_checkpoint):
            with pytest.raises(ConfigError, match=r"another trainer of this process has saved .*Fix: "):
                call()
    assert counts(tmp_path) == {1: 86}


def test_the_same_path_again_goes_on_where_it_was(tmp_path: Path) -> None:
    make(tmp_path / "a", keep_last=9).run_training()
    source = str(tmp_path / "a" / "checkpoints" / "step-00000004")
    for folder in ("b", "a"):  # in the run itself, retention deletes the source
        first = make(tmp_path / folder, resume=source, num_epochs=3, keep_last=1, keep_best=0)
        assert first.step == 4
        first.run_training()
        assert make(tmp_path / folder, resume=source, num_epochs=3, keep_last=1, keep_best=0).step == 15
    with pytest.raises(UserError, match=r"training.resume is 'nver', which is neither.*Did you mean 'never'\?"):
        make(tmp_path / "c", resume="nver")
    assert not (tmp_path / "c").exists()


def test_a_loader_of_other_data_is_refused_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    make(tmp_path, num_epochs=None, num_steps=3).run_training()
    trainer = make(tmp_path, num_epochs=2)
    loader, _, _ = trainer.prepare_dataloaders(train_dataset=tiny.make_data(44))
    with pytest.raises(DataError, match="num_samples=43"):
        trainer.run_training(loader)


def test_ranks_whose_folders_hold_other_runs_take_rank_0s(tmp_path: Path) -> None:
    first = []
    for rank, noise in ((0, 0), (1, 5)):
        (tmp_path / str(rank)).mkdir()
        trainer = TrainerDDP(config=tiny.make_config(tmp_path / str(rank) / "run", num_epochs=1))
        trainer.prepare_dataloaders(train_dataset=tiny.make_data(40, seed=noise))
        trainer.run_training()
        first.append(tiny.weights(trainer))
    del trainer
    gc.collect()  # this process holds the folder as long as it has a trainer there
    zero, one = everyrank.launch(alone.with_folders_of_their_own, tmp_path, nproc_per_node=2)
    for name, value in first[0].items():
        assert not torch.equal(value, first[1][name])
        assert torch.equal(zero["loaded"][name], value)
        assert torch.equal(one["loaded"][name], value)
        assert torch.equal(zero["trained"][name], one["trained"][name])


def test_a_configuration_from_elsewhere_does_not_choose_what_is_called(tmp_path: Path) -> None:
    make(tmp_path, num_epochs=1).run_training()
    config = tmp_path / "config.yaml"
    text = config.read_text()
    assert "!pyobject tiny.TinyNet" in text
    for name in ("os.system", "subprocess.Popen"):
        command = f"touch {tmp_path}/called"
        harm = text.replace("!pyobject tiny.TinyNet", f"!pyobject {name}").replace("args: []", f"args: ['{command}']")
        config.write_text(harm)
        with pytest.raises(ConfigError, match=r"which is no class of nn.Module. Pass it: load_model\(path, model\)"):
            TrainerDDP.load_model(tmp_path)
        assert not (tmp_path / "called").exists()
    assert TrainerDDP.load_model(tmp_path, tiny.TinyNet().double()) is not None
