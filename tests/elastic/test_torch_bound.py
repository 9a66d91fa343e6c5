"""The private names of torch that we use exist in every torch that we allow, and another torch is refused."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from conftest import ROOT
from everyrank.elastic.process import torch_bound
from everyrank.errors import ConfigError


@pytest.mark.parametrize("name", torch_bound.PRIVATE_NAMES)
def test_the_name_exists(name: str) -> None:
    module, _, path = name.partition(":")
    functools.reduce(getattr, path.split("."), importlib.import_module(module))


def test_every_private_name_in_the_source_is_listed() -> None:
    private = re.compile(r"\b(?:torch|dist|distributed_c10d|distributed)\.(_[a-z]\w+)")
    listed = {part for name in torch_bound.PRIVATE_NAMES for part in re.split(r"[:.]", name)}
    found = {
        name: str(path.relative_to(ROOT))
        for path in Path(ROOT, "src", "everyrank").rglob("*.py")
        for name in private.findall(path.read_text())
    }
    assert {name: path for name, path in found.items() if name not in listed} == {}


def test_the_bound_is_stated_once_more_where_people_look() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = (".".join(map(str, bound)) for bound in (torch_bound.LOWEST, torch_bound.BELOW))
    assert f"torch>={low},<{high}" in project["dependencies"]
    assert f"torch {low}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("version", ["2.6.0", "2.12.1+cu130", "2.14.0"])
def test_another_torch_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    torch_bound.check_torch.cache_clear()
    with pytest.raises(ConfigError, match=re.escape(f"torch {version} is installed") + ".*Fix: pip install"):
        torch_bound.check_torch()


def test_the_torch_here_is_allowed() -> None:
    torch_bound.check_torch()
