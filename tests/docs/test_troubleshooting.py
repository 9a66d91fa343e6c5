"""Every entry of the troubleshooting page is a symptom that is provoked here, and says what is really printed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from provocations import Provoker

from conftest import ROOT, RunCli

_PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
_HEADING = re.compile(r"^### (.+?) \{ ?#([a-z0-9-]+) ?\}$", re.MULTILINE)
_QUOTE = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One entry: its id, the lines it quotes (``...`` stands for anything within a line), and all of its text."""

    name: str
    quoted: tuple[str, ...]
    text: str


def _entries() -> list[Entry]:
    parts = _HEADING.split(_PAGE)[1:]
    entries = []
    for _, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        quoted = [line.strip() for block in _QUOTE.findall(body) for line in block.splitlines() if line.strip()]
        entries.append(Entry(name, tuple(quoted), body))
    return entries


ENTRIES = _entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_symptom_is_real_and_said_as_the_page_says(
    entry: Entry,
    tmp_path: Path,
    run_cli: RunCli,
    start_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provoke = getattr(Provoker(tmp_path, run_cli, start_cli, monkeypatch), entry.name.replace("-", "_"))
    told = provoke()
    missing = [line for line in entry.quoted if not re.search(_pattern(line), told)]
    assert missing == [], told


def test_the_page_and_the_provocations_are_the_same_list() -> None:
    methods = {n.replace("_", "-") for n, _ in inspect.getmembers(Provoker, inspect.isfunction) if n[0] != "_"}
    names = [entry.name for entry in ENTRIES]
    assert set(names) == methods - {"run"}
    assert len(names) == len(set(names)) >= 15
    for entry in ENTRIES:
        assert entry.quoted, f"{entry.name} quotes nothing"
        for part in ("**Why.**", "**Mend.**"):
            assert part in entry.text, f"{entry.name} lacks {part}"


def _pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split("..."))
