"""Settings that are changed when a run goes on: applied, kept or refused, and said; never ignored."""

from __future__ import annotations

import dataclasses
import re
import runpy
import shutil
import typing
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from everyrank import ConfigError, TrainerDDP
from everyrank.config.schema import section_of
from everyrank.config.yaml_loader import read_names, to_yaml
from everyrank.training.config import TrainerConfig, plain_config, read_config
from everyrank.training.saving.changes import OF_THE_RATE, RULES, Fate, fate_of, find_changes, refuse

ROOT = Path(__file__).parents[3]
STEP_LR = {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 9}}
OPTIMIZER = {"optimizer_type": torch.optim.AdamW, "optimizer_kwargs": {"lr": 0.01, "weight_decay": 0.1}}
BASE: dict[str, Any] = {**OPTIMIZER, "num_epochs": 2, "checkpoint_at": 1, "ledger": True, "keep_best": 0}

# One change of each setting that matters: changes of `training`, key, what is done about it.
CHANGES: list[tuple[dict[str, Any], str, Fate]] = [
    ({"seed": 7}, "training.seed", Fate.REFUSED),
    ({"optimizer_type": torch.optim.Adam}, "training.optimizer_type", Fate.REFUSED),
    ({"scheduler": STEP_LR}, "training.scheduler.type", Fate.REFUSED),
    ({"shuffle": False}, "training.shuffle", Fate.REFUSED),
    ({"drop_last": True}, "training.drop_last", Fate.REFUSED),
    ({"global_batch_size": 20}, "training.global_batch_size", Fate.KEPT),
    ({"optimizer_kwargs": {"lr": 0.5, "weight_decay": 0.1}}, "training.optimizer_kwargs.lr", Fate.TRAINS),
    ({"optimizer_kwargs": {"lr": 0.01}}, "training.optimizer_kwargs.weight_decay", Fate.TRAINS),
    ({"accumulation_steps": 2}, "training.accumulation_steps", Fate.TRAINS),
    ({"dropout": 0.5}, "model.kwargs.dropout", Fate.TRAINS),
    ({"clip_grad_norm": 1.0}, "training.clip_grad_norm", Fate.TRAINS),
    ({"ema": {"decay": 0.9}}, "training.ema.decay", Fate.TRAINS),
    ({"keep_last": 5}, "training.keep_last", Fate.FREE),
    ({"validation": {"batch_size": 3}}, "validation.batch_size", Fate.FREE),
]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def train(folder: Path, until_epoch: int | None = None, **changes: Any) -> TrainerDDP:
    trainer = TrainerDDP(config=tiny.make_config(folder, **{**BASE, **changes}))
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(35), val_dataset=tiny.make_data(9))
    trainer.run_training(until_epoch=until_epoch)
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "half", until_epoch=1)
    train(folder / "whole")
    return {"half": folder / "half", "whole": folder / "whole"}


@pytest.mark.parametrize(("changes", "key", "fate"), CHANGES, ids=[key for _, key, _ in CHANGES])
def test_each_change_is_applied_kept_or_refused(
    tmp_path: Path, runs: dict[str, Path], changes: dict[str, Any], key: str, fate: Fate
) -> None:
    assert fate_of(key) is fate
    for state in ("half", "whole"):
        run = tmp_path / state
        shutil.copytree(runs[state], run)
        before = contents(run)
        if fate is Fate.REFUSED or (fate is Fate.TRAINS and state == "whole"):
            with pytest.raises(ConfigError, match="Fix: set them as the run has them") as found:
                train(run, **changes)
            assert any(problem.startswith(f"{key}: the run has ") for problem in found.value.problems)
            after = contents(run)
            assert after == {**before, ".in-use": after[".in-use"]}, "a refused resume changes no file"
            continue
        trainer = train(run, **changes)
        said = (run / "logs" / "rank-0.log").read_text()
        assert f"{key}: the run has " in said
        assert ("it is kept" if fate is Fate.KEPT else "it is applied") in said
        written = read_names(run / "config.yaml")["training"]["global_batch_size"]
        assert written == trainer.global_batch_size == 10


def test_a_changed_rate_is_the_one_that_trains_on(tmp_path: Path, runs: dict[str, Path]) -> None:
    shutil.copytree(runs["half"], tmp_path / "run")
    trainer = train(tmp_path / "run", optimizer_kwargs={"lr": 0.5, "weight_decay": 0.0})
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)
    assert [row["lr"] for row in trainer.history.training()] == [0.01, 0.5]


def test_with_a_schedule_a_changed_rate_is_refused(tmp_path: Path) -> None:
    train(tmp_path, until_epoch=1, scheduler=STEP_LR)
    with pytest.raises(ConfigError, match=r"training.optimizer_kwargs.lr: the run has 0.01, configured is 0.5"):
        train(tmp_path, scheduler=STEP_LR, optimizer_kwargs={"lr": 0.5, "weight_decay": 0.1})
    with pytest.raises(ConfigError, match=r"training.scheduler.kwargs.step_size: the run has 9, configured is 3"):
        train(tmp_path, scheduler={**STEP_LR, "kwargs": {"step_size": 3}})


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path: Path) -> None:
    stopping = {"kwargs": {"patience": 1, "delta": 100.0}}
    assert train(tmp_path, num_epochs=9, early_stopping=stopping).epoch == 2
    assert train(tmp_path, num_epochs=9, early_stopping=stopping).epoch == 2
    assert train(tmp_path, num_epochs=9, early_stopping={"kwargs": {"patience": 4, "delta": 100.0}}).epoch == 5
    assert train(tmp_path, num_epochs=9, early_stopping=None).epoch == 9


def test_trials_that_share_a_path_do_not_share_a_result(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ConfigError, match="is complete, and was trained with other settings"):
        train(tmp_path, optimizer_kwargs={"lr": 0.1, "weight_decay": 0.1})


def test_a_trial_goes_on_from_a_pruned_one_with_its_settings_alone(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")

    def train_trial(lr: float, trial: Any) -> TrainerDDP:
        trainer = TrainerDDP(config=tiny.make_config(tmp_path, **{**BASE, "optimizer_kwargs": {"lr": lr}}))
        trainer.prepare_dataloaders(train_dataset=tiny.make_data(35), val_dataset=tiny.make_data(9))
        trainer.run_training(trial=trial)
        return trainer

    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.0))
    with pytest.raises(optuna.TrialPruned, match="pruned after epoch 0"):
        train_trial(0.01, study.ask())
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="is a trial's with other settings") as found:
        train_trial(0.5, study.ask())
    assert found.value.problems == ("training.optimizer_kwargs.lr: the run has 0.01, configured is 0.5",)
    after = contents(tmp_path)
    assert after == {**before, ".in-use": after[".in-use"]}
    assert train_trial(0.01, None).epoch == 2, "the same trial once more"
    with pytest.raises(ConfigError, match="is a trial's with other settings"):
        train_trial(0.5, study.ask())


def test_every_key_has_a_rule_and_the_documentation_lists_them() -> None:
    def keys(schema: Any, before: str = "") -> list[str]:
        found = []
        for field in dataclasses.fields(schema):
            nested = section_of(typing.get_type_hints(schema)[field.name])
            found += keys(nested, f"{before}{field.name}.") if nested else [f"{before}{field.name}"]
        return found

    known = keys(TrainerConfig)
    assert all(isinstance(fate_of(key), Fate) for key in known)
    for rule in RULES:
        assert any(key == rule or key.startswith(f"{rule}.") for key in known), f"{rule} is no key"
    assert runpy.run_path(str(ROOT / "scripts" / "write_reference.py"))["changes"]() in (
        ROOT / "docs" / "runs.md"
    ).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), other=st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(), st.none()))
def test_whatever_differs_is_found_and_has_its_fate(record: Path, data: st.DataObject, other: Any) -> None:
    """One setting of any section in the file of the run is another: it alone is found, and refused where it must be."""
    config = read_config(tiny.make_config(record, **{**BASE, "scheduler": STEP_LR, "parallel": {}, "ema": {}}))
    values = plain_config(config)
    section, path = values, []
    while not path or (isinstance(section.get(path[-1]), dict) and section[path[-1]]):
        section = section[path[-1]] if path else section
        path.append(data.draw(st.sampled_from(sorted(section))))
    key, now = ".".join(path), section[path[-1]]
    assume(other != now and not (other is None and now in ({}, [])))
    section[path[-1]] = other
    (record / "config.yaml").write_text(to_yaml(values), encoding="utf-8")
    found = find_changes(record, config)
    if key in ("training.path", "training.resume", "parallel.rank", "parallel.world_size"):
        assert found == [], "where it runs is no setting of what is trained"
        return
    assert [(change.key, change.old) for change in found] == [(key, other)]
    fate = Fate.REFUSED if key == OF_THE_RATE else fate_of(key)
    assert found[0].fate is fate
    for is_over, is_trial in product((False, True), repeat=2):
        is_refused = fate is Fate.REFUSED or (is_over and fate is Fate.TRAINS) or (is_trial and fate is not Fate.FREE)
        with pytest.raises(ConfigError, match=re.escape(key)) if is_refused else nullcontext():
            refuse(found, record, is_over=is_over, is_trial=is_trial)


def test_an_unchanged_configuration_is_no_change(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path)
    config["criterion"] = lambda output, data: tiny.compute_loss(output, data)
    trainer = TrainerDDP(config=config)
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(12))
    trainer.run_training()
    config["criterion"] = lambda output, data: tiny.compute_loss(output, data)
    TrainerDDP(config=read_config(plain_config(read_config(config))))


def test_the_trainers_own_record_of_its_settings_shows_no_secret(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path / "run", num_epochs=1)
    config["data"] = {"type": Guarded, "kwargs": {"api_key": "xyzzy", "target_key": "y"}, "split": [1.0, 0.0, 0.0]}
    for _ in range(2):
        trainer = TrainerDDP(config=config)
        assert trainer.prepare_dataloaders()[0] is not None
        text = (tmp_path / "run" / "config.yaml").read_text()
        assert "xyzzy" not in text
        assert "target_key: y" in text
        del trainer


class Guarded(TensorDataset):
    def __init__(self, api_key: str, target_key: str) -> None:
        assert (api_key, target_key) == ("xyzzy", "y")
        super().__init__(*tiny.make_data(12).tensors)
