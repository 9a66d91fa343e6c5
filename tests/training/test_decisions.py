"""Stop and prune are decided once and obeyed by all ranks in the same epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny

import everyrank
from everyrank import DefaultEarlyStopping
from everyrank.errors import ConfigError


def stops_after(stopping: DefaultEarlyStopping, values: list[Any]) -> int | None:
    for number, value in enumerate(values, start=1):
        if stopping(value if isinstance(value, dict) else {"val_loss": value}):
            return number
    return None


@pytest.mark.parametrize(
    ("kwargs", "values", "expected"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 1], 4),
        ({"patience": 2}, [3, 2, 2, 1, 1, 0], None),
        ({"patience": 2, "delta": 0.5}, [3, 2.6, 2.4, 2.3, 2.2], 5),
        ({"patience": 1, "mode": "max"}, [1, 2, 3, 3], 4),
        ({"patience": 1, "grace_period": 3}, [1, 2, 3, 4, 5], 4),
        # the moving mean of two still falls where single values go up and down
        ({"patience": 1, "window": 2}, [5, 3, 4, 2, 3, 1, 3], 7),
        ({"patience": 1, "window": 1}, [5, 3, 4, 2, 3, 1, 3], 3),
        ({"patience": 2}, [math.nan, math.nan, math.nan], 2),
        ({"patience": 2}, [math.inf, 5, 4, 4, 4], 5),
    ],
)
def test_when_it_stops(kwargs: dict[str, Any], values: list[float], expected: int | None) -> None:
    assert stops_after(DefaultEarlyStopping(**kwargs), values) == expected


@pytest.mark.parametrize(("combine", "expected"), [("any", 3), ("all", 5)])
def test_several_metrics(combine: Any, expected: int) -> None:
    stopping = DefaultEarlyStopping(patience=2, metric=["val_loss", "val_acc"], mode=["min", "max"], combine=combine)
    values = [{"val_loss": 1, "val_acc": acc} for acc in (0.1, 0.2, 0.3, 0.3, 0.3)]
    assert stops_after(stopping, values) == expected


def test_its_state_goes_on_where_it_was() -> None:
    values = [5, 4, 4.5, 4.2, 4.4, 4.3]
    whole, half = DefaultEarlyStopping(patience=3, window=2), DefaultEarlyStopping(patience=3, window=2)
    for value in values[:3]:
        whole({"val_loss": value})
        half({"val_loss": value})
    resumed = DefaultEarlyStopping(patience=3, window=2)
    resumed.load_state_dict(half.state_dict())
    assert [whole({"val_loss": v}) for v in values[3:]] == [resumed({"val_loss": v}) for v in values[3:]]
    assert whole.state_dict() == resumed.state_dict()


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'val_loss'"):
        DefaultEarlyStopping(metric="val_los")({"val_loss": 1.0, "train_loss": 1.0})
    for wrong in ({"patience": 0}, {"mode": "mim"}, {"combine": "both"}, {"metric": []}, {"window": 0}):
        with pytest.raises(ConfigError):
            DefaultEarlyStopping(**wrong)  # type: ignore[arg-type]


def test_all_ranks_stop_in_the_same_epoch_as_one_process_would(tmp_path: Path) -> None:
    results = everyrank.launch(tiny.stop_early, tmp_path / "3", "", nproc_per_node=3)
    epochs = {result["epoch"] for result in results}
    assert len(epochs) == 1
    assert 2 < epochs.pop() < 40
    stopping = DefaultEarlyStopping(patience=2, delta=0.02, metric=["val_loss", "val_error"], combine="all")
    rows = [{"val_loss": row["loss"], "val_error": row["error"]} for row in results[2]["validation"]]
    assert stops_after(stopping, rows) == len(rows) == results[0]["epoch"]
    # the same command again has nothing to do: the decision is in the checkpoint
    again = everyrank.launch(tiny.stop_early, tmp_path / "3", "", nproc_per_node=2)
    assert again[0]["epoch"] == results[0]["epoch"]


def test_a_study_over_two_ranks_prunes_on_both_and_strands_none(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    results = everyrank.launch(tiny.study, tmp_path, 6, nproc_per_node=2)
    states = results[0]["states"]
    assert len(states) == 6
    assert set(states) == {"COMPLETE", "PRUNED"}
    assert results[0]["pruned"] == results[1]["pruned"] == [i for i, state in enumerate(states) if state == "PRUNED"]
