"""One process writes into a run's folder; others may read it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import live
import pytest
import tiny
from waiting import wait_for

from everyrank import ConfigError, TrainerDDP


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, live.__file__, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == "stands\n"
    yield process
    process.kill()
    process.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_live_run_is_only_read_and_its_death_frees_it(tmp_path: Path, running: subprocess.Popen[str]) -> None:
    run = tmp_path / "run"
    config = tiny.make_config(run, checkpoint_every_steps=2, ledger=True)
    wait_for(run / "checkpoints" / "step-00000004")  # written in the background
    before = contents(run)
    second = TrainerDDP(config=config)
    loaders = second.prepare_dataloaders(train_dataset=tiny.make_data(), test_dataset=tiny.make_data(9))
    assert second.step > 0
    assert second.run_test(loaders[2]).num_samples == 9
    for call in (second.run_training, second.save_checkpoint):
        with pytest.raises(ConfigError, match=rf"is in use by pid {running.pid} on .*Fix: "):
            call()
    assert contents(run) == before

    running.kill()
    running.wait()
    third = TrainerDDP(config=config)
    third.prepare_dataloaders(train_dataset=tiny.make_data())
    third.run_training()
    assert third.step == 33
