"""Progress, trackers, the history file and the figure."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny

from everyrank import TrainerDDP
from everyrank.errors import ConfigError
from everyrank.training.tracking.history import History, read_history
from everyrank.training.tracking.progress import Progress, format_seconds


class Recorder:
    """A sink of the user's own."""

    calls: list[Any] = []  # noqa: RUF012 - shared on purpose: the trainer makes the sink
    fail_at: int | None = None

    def start(self, config: Any) -> None:
        Recorder.calls.append(("start", config["training"]["num_epochs"]))

    def log(self, values: Any, step: int) -> None:
        Recorder.calls.append(("log", step, dict(values)))
        if Recorder.fail_at == step:
            raise ConnectionError("the tracker is gone")

    def close(self) -> None:
        Recorder.calls.append(("close",))


def train(path: Path, **changes: Any) -> TrainerDDP:
    trainer = TrainerDDP(config=tiny.make_config(path, **changes))
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(20), val_dataset=tiny.make_data(9))
    trainer.run_training()
    return trainer


def test_an_own_sink_and_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "calls", [])
    tracking = {"tensorboard": False, "sinks": [Recorder]}
    train(tmp_path / "a", num_epochs=2, tracking=tracking)
    kinds = [call[0] for call in Recorder.calls]
    assert kinds == ["start", *["log"] * 6, "close"]
    steps = [call[1] for call in Recorder.calls if call[0] == "log"]
    assert sorted(steps) == [1, 2, 2, 3, 4, 4]
    logged = {name for call in Recorder.calls if call[0] == "log" for name in call[2]}
    assert logged >= {"train/loss_step", "train/lr", "train/loss", "val/loss", "val/error"}

    monkeypatch.setattr(Recorder, "fail_at", 1)
    trainer = train(tmp_path / "b", num_epochs=2, tracking=tracking)
    assert trainer.epoch == 2, "a tracker that fails does not end the training"
    assert (
        "Recorder failed and is left out from here on: the tracker is gone"
        in (tmp_path / "b" / "logs" / "rank-0.log").read_text()
    )


def test_trackers_behind_the_same_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    wandb: Any = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("wandb", step)), finish=lambda: calls.append(("wandb", "end"))
    )
    wandb.init = lambda config, **options: calls.append(("wandb", options)) or run
    mlflow: Any = types.ModuleType("mlflow")
    mlflow.start_run = lambda **options: calls.append(("mlflow", options))
    mlflow.log_dict = lambda values, name: calls.append(("mlflow", name))
    mlflow.log_metrics = lambda values, step: calls.append(("mlflow", step))
    mlflow.end_run = lambda: calls.append(("mlflow", "end"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    tracking = {"tensorboard": False, "wandb": {"project": "p"}, "mlflow": {"run_name": "r"}}
    train(tmp_path, num_epochs=1, tracking=tracking)
    assert [what for name, what in calls if name == "wandb"] == [{"project": "p"}, 1, 2, 2, "end"]
    assert [what for name, what in calls if name == "mlflow"] == [{"run_name": "r"}, "config.json", 1, 2, 2, "end"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"training.tracking.wandb is set, but wandb is not installed"):
        train(tmp_path / "b", tracking=tracking)


def test_progress_without_a_terminal_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        "everyrank.training.tracking.progress.logger.info", lambda text, *args: lines.append(text % args)
    )
    clock = [0.0]
    monkeypatch.setattr("everyrank.training.tracking.progress.time.monotonic", lambda: clock[0])
    progress = Progress("auto", num_epochs=2, steps_per_epoch=100, samples_per_step=30, world_size=3)
    assert progress.mode == "plain"
    progress.start()
    for step, now in ((1, 1.0), (50, 11.0), (60, 12.0), (150, 30.0)):
        clock[0] = now
        progress.update(step // 100, step, 0.25)
    assert lines == [
        "epoch 1/2, step 50/100: step 50, loss 0.25, 136 samples/s (45 per rank), 33 s left",
        "epoch 2/2, step 50/100: step 150, loss 0.25, 150 samples/s (50 per rank), 10 s left",
    ]
    progress.stop()


def test_live_progress_shows_and_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    progress = Progress("live", num_epochs=1, steps_per_epoch=4, samples_per_step=8, world_size=2)
    progress.start()
    progress.update(0, 3, 0.5)
    progress.stop()
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown
    assert "loss 0.5" in shown
    assert "per rank" in shown


def test_durations() -> None:
    assert [format_seconds(s) for s in (12.4, 185, 7625)] == ["12 s", "3 min 05 s", "2 h 07 min"]


def test_the_history_forgets_what_came_after_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(path)
    history.add_step({"step": 1, "loss": float("nan")})
    history.flush()
    state = history.state_dict()
    history.add_step({"step": 2, "loss": 1.0})
    history.flush()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')  # killed while writing
    assert [row["step"] for row in read_history(path)] == [1, 2]
    resumed = History(path)
    resumed.load_state_dict(state)
    assert read_history(path) == [{"kind": "step", "step": 1, "loss": None}]
