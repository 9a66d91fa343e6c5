"""The numbers of a run, as they are recorded: ``history.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from everyrank.checkpoint.folder import said_plainly

Row = dict[str, Any]


class History:
    """Records rows of several kinds: ``step`` (loss and learning rate), ``epoch`` (training and validation results),
    ``validation`` (between two steps of an epoch), ``test``.

    Every rank keeps the rows of epochs and validations, which ``run_training`` returns; rank 0 writes all rows to the
    file. A checkpoint holds the position in the file, so that a resumed run cuts off what came after it and goes on.

    Args:
        path: The file, on the rank that writes; None on the others.

    Attributes:
        rows: The rows of epochs and validations.
        num_rows: Number of all rows.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.num_rows = 0
        self._pending: list[str] = []

    def add_step(self, row: Row) -> None:
        """Record a step; it reaches the file at the next ``flush``."""
        self._add({"kind": "step", **row})

    def add_result(self, kind: Literal["epoch", "validation"], row: Row) -> Row:
        """Record an epoch or a validation, flush, and return the whole row."""
        self.rows.append({"kind": kind, **row})
        self._add(self.rows[-1])
        self.flush()
        return self.rows[-1]

    def add_other(self, kind: str, row: Row) -> None:
        """Record a row of another kind, such as ``test``, and flush."""
        self._add({"kind": kind, **row})
        self.flush()

    def flush(self) -> None:
        """Write the rows that are waiting."""
        if self.path is not None and self._pending:
            with said_plainly(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._pending))
        self._pending.clear()

    def training(self) -> list[Row]:
        """Return a row for each epoch: ``epoch``, ``step``, ``loss``, ``seconds``, ``lr``."""
        keys = ("epoch", "step", "seconds", "lr")
        return [{**{key: row[key] for key in keys}, "loss": row["train_loss"]} for row in self.epochs]

    def validation(self) -> list[Row]:
        """Return a row for each validation: ``epoch``, ``step``, ``loss``, ``loss_std``, and the metrics."""
        found = []
        for row in self.rows:
            if "val_loss" in row:
                values = {key.removeprefix("val_"): value for key, value in row.items() if key.startswith("val_")}
                found.append({"epoch": row["epoch"], "step": row["step"], **values})
        return found

    @property
    def epochs(self) -> list[Row]:
        """The rows of epochs."""
        return [row for row in self.rows if row["kind"] == "epoch"]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the rows of epochs and validations."""
        return {"num_rows": self.num_rows, "rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state: Mapping[str, Any], *, current_epoch: int | None = None) -> None:
        """Go back to a saved position: what the file holds beyond it belongs to steps that were lost.

        Args:
            state: What ``state_dict`` returned.
            current_epoch: The epoch that is trained on. Where the run had ended in the middle of it, and has been given
                more steps since, the row that it ended with is forgotten.
        """
        self.rows = [dict(row) for row in state["rows"]]
        self.num_rows = int(state["num_rows"])
        if self.rows and self.rows[-1]["kind"] == "epoch" and self.rows[-1]["epoch"] == current_epoch:
            self.rows.pop()
            self.num_rows -= 1
        self._pending.clear()
        if self.path is not None:
            self.write_to(self.path)

    def write_to(self, path: Path | None) -> None:
        """Write to ``path`` from here on; what it holds beyond the position is cut off. None: write nowhere."""
        self.path = path
        if self.path is None:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if len(lines) < self.num_rows:  # the file is another run's, or was lost: keep at least these rows
            lines = [_to_line(row) for row in self.rows]
            self.num_rows = len(lines)
        replacement = self.path.with_suffix(".tmp")
        with said_plainly(self.path):
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


def _to_line(row: Row) -> str:
    # JSON has no NaN: it is written as null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"
