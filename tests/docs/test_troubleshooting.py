"""Every entry of the troubleshooting page is a symptom that is provoked here, and says what is really printed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from provocations import Provoker
from troubleshooting_page import ENTRIES, VERDICT, Entry

from conftest import RunCli

_PROVOKED_HERE = [entry for name, entry in ENTRIES.items() if not name.startswith(VERDICT)]


@pytest.mark.parametrize("entry", _PROVOKED_HERE, ids=lambda entry: entry.name)
def test_the_symptom_is_real_and_said_as_the_page_says(
    entry: Entry,
    tmp_path: Path,
    run_cli: RunCli,
    start_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provoke = getattr(Provoker(tmp_path, run_cli, start_cli, monkeypatch), entry.name.replace("-", "_"))
    told = provoke()
    assert entry.missing(told) == [], told


def test_the_page_and_the_provocations_are_the_same_list() -> None:
    methods = {n.replace("_", "-") for n, _ in inspect.getmembers(Provoker, inspect.isfunction) if n[0] != "_"}
    names = {entry.name for entry in _PROVOKED_HERE}
    assert names == methods - {"run"}
    assert len(names) >= 15
    for entry in ENTRIES.values():
        assert entry.quoted, f"{entry.name} quotes nothing"
        for part in ("**Why.**", "**Mend.**"):
            assert part in entry.text, f"{entry.name} lacks {part}"
