"""The run's curve, one JSON object a line, cut back to where a resumed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class History:
    """Appends records to ``history.jsonl``; only rank 0 writes.

    Args:
        path: The file.
        active: Whether this rank writes.
    """

    def __init__(self, path: Path, *, active: bool) -> None:
        self.path, self.active = path, active

    def cut(self, iteration: int) -> None:
        """Drop the records of iterations after ``iteration``, which the run is about to do again."""
        if not self.active or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _iteration(line) <= iteration]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.rename(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record."""
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a crash cut short goes too
