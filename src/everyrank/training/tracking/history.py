"""The numbers of a run, as they are recorded: ``history.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class History:
    """Records rows of two kinds: ``step`` (loss and learning rate) and ``epoch`` (training and validation results).

    Every rank keeps the rows of epochs, which ``run_training`` returns; rank 0 writes all rows to the file. A
    checkpoint holds the position in the file, so that a resumed run cuts off what came after it and goes on.

    Args:
        path: The file, on the rank that writes; None on the others.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.epochs: list[Row] = []
        self.num_rows = 0
        self._pending: list[str] = []

    def add_step(self, row: Row) -> None:
        """Record a step; it reaches the file at the next ``flush``."""
        self._add({"kind": "step", **row})

    def add_epoch(self, row: Row) -> None:
        """Record an epoch and flush."""
        self.epochs.append(row)
        self._add({"kind": "epoch", **row})
        self.flush()

    def add_other(self, kind: str, row: Row) -> None:
        """Record a row of another kind, such as ``test``, and flush."""
        self._add({"kind": kind, **row})
        self.flush()

    def flush(self) -> None:
        """Write the rows that are waiting."""
        if self.path is not None and self._pending:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._pending))
        self._pending.clear()

    def training(self) -> list[Row]:
        """Return a row for each epoch: ``epoch``, ``step``, ``loss``, ``seconds``, ``lr``."""
        keys = ("epoch", "step", "seconds", "lr")
        return [{**{key: row[key] for key in keys}, "loss": row["train_loss"]} for row in self.epochs]

    def validation(self) -> list[Row]:
        """Return a row for each validated epoch: ``epoch``, ``step``, ``loss``, ``loss_std``, and the metrics."""
        return [
            {"epoch": row["epoch"], "step": row["step"], **_without_prefix(row)}
            for row in self.epochs
            if "val_loss" in row
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the rows of epochs."""
        return {"num_rows": self.num_rows, "epochs": [dict(row) for row in self.epochs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved position: what the file holds beyond it belongs to steps that were lost."""
        self.epochs = [dict(row) for row in state["epochs"]]
        self.num_rows = int(state["num_rows"])
        self._pending.clear()
        if self.path is None:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if len(lines) < self.num_rows:  # the file is another run's, or was lost: keep at least the epochs
            lines = [_to_line({"kind": "epoch", **row}) for row in self.epochs]
            self.num_rows = len(lines)
        replacement = self.path.with_suffix(".tmp")
        replacement.write_text("".join(lines[: self.num_rows]), encoding="utf-8")
        os.replace(replacement, self.path)

    def _add(self, row: Row) -> None:
        self.num_rows += 1
        if self.path is not None:
            self._pending.append(_to_line(row))


def read_history(path: Path) -> list[Row]:
    """Return the rows of a history file; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one number, where it is present."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _without_prefix(row: Row) -> Row:
    return {key.removeprefix("val_"): value for key, value in row.items() if key.startswith("val_")}


def _to_line(row: Row) -> str:
    # JSON has no NaN: it is written as null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"
