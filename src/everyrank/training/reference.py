"""Writes the reference page of the trainer's configuration: ``python -m everyrank.training.reference``."""

from __future__ import annotations

import sys
from pathlib import Path

from everyrank.config.reference import reference_page
from everyrank.diagnosis.watch_config import WatchConfig
from everyrank.training.config import TrainerConfig

PAGE = Path("docs/reference/configuration.md")

_INTRODUCTION = """\
Every key that `TrainerDDP` reads. This page is written from the schema by `python -m everyrank.training.reference`.

Values that are classes or functions are written as `!pyobject package.module.name` in YAML that is read with
`everyrank.get_loader()`, or as the same name in plain text. A section that says *section* has a table of its own below.
A key, type or value that is not listed here is refused, with its path and the nearest name that is.
"""


_WATCH = """\
Settings of a run, not of the trainer: `everyrank run watch.stall_s=30 ...`. See
[Who is guilty](../runs.md#who-is-guilty).
"""


def page() -> str:
    """Return the page."""
    trainer = reference_page(TrainerConfig, title="Configuration of TrainerDDP", introduction=_INTRODUCTION.strip())
    watch = reference_page(WatchConfig, title="watch", introduction=_WATCH.strip())
    return f"{trainer}\n#{watch}"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(), encoding="utf-8")
    print(target)
