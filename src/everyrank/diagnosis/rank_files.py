"""The files that a rank leaves in the run's log folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any


def log_file(log_dir: str, rank: int) -> str:
    """Path of a rank's log."""
    return os.path.join(log_dir, f"rank-{rank}.log")


def error_file(log_dir: str, rank: int) -> str:
    """Path of the file in which a rank records the exception that ended it."""
    return os.path.join(log_dir, f"rank-{rank}.error.json")


def existing(path: str) -> str | None:
    """The path, or None if there is no such file."""
    return path if os.path.exists(path) else None


def read_error(path: str) -> Mapping[str, Any] | None:
    """A rank's record of its exception, or None if it left none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def clear_errors(log_dir: str) -> None:
    """Remove the records of an earlier launch."""
    if os.path.isdir(log_dir):
        for name in os.listdir(log_dir):
            if name.endswith(".error.json"):
                os.remove(os.path.join(log_dir, name))
