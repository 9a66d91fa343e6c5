"""One answer of the doctor, and how answers are shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

Status = Literal["ok", "warn", "wrong"]
_COLORS = {"ok": "green", "warn": "yellow", "wrong": "red"}


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do about it.

    Attributes:
        name: What was looked at.
        status: ``ok``; ``warn``: it may bite; ``wrong``: it will.
        found: What was found.
        fix: What to do; empty if nothing is to be done.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def may_bite(name: str, found: str, is_bad: bool, fix: str) -> Check:
    """Return a check that warns and says what to do, if what was found is bad."""
    return Check(name, "warn", found, fix) if is_bad else Check(name, "ok", found)


def is_well(checks: Sequence[Check]) -> bool:
    """Return whether nothing is wrong."""
    return all(check.status != "wrong" for check in checks)


def as_json(checks: Sequence[Check]) -> str:
    """The checks as a list of ``name``, ``status``, ``found`` and ``fix``."""
    return json.dumps([dataclasses.asdict(check) for check in checks], indent=2)


def print_table(checks: Sequence[Check]) -> None:
    """Print the checks as a table, the cure under what was found."""
    table = Table(show_lines=False)
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        found = check.found + (f"\nFix: {check.fix}" if check.fix else "")
        table.add_row(f"[{_COLORS[check.status]}]{check.status}[/]", check.name, found)
    Console(highlight=False).print(table)
