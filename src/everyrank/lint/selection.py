"""Which rules are on, and which files are looked at."""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everyrank.errors import UserError, did_you_mean
from everyrank.lint.engine import DOES_NOT_PARSE
from everyrank.lint.rules import RULES
from everyrank.lint.source import KIND_OF_SUFFIX

_SKIPPED = {"__pycache__", "node_modules", "site-packages", "build", "dist", "venv"}
_TABLE = "[tool.everyrank.check]"


@dataclass(frozen=True)
class Configured:
    """What ``[tool.everyrank.check]`` of a pyproject.toml says."""

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def choose(select: Sequence[str], ignore: Sequence[str]) -> frozenset[str]:
    """Return the codes that are on; ``select`` and ``ignore`` hold codes, beginnings of codes, or ``ALL``.

    Nothing selected means the default rules. The longer of two that disagree wins, as in ruff.

    Raises:
        UserError: One of them begins no code.
    """
    codes = [DOES_NOT_PARSE, *(rule.code for rule in RULES)]
    for prefix in (*select, *ignore):
        if prefix != "ALL" and not any(code.startswith(prefix) for code in codes):
            raise UserError(
                f"{prefix!r} was given, and no rule's code begins so.{did_you_mean(prefix, codes)} "
                "Fix: give codes such as ER003, beginnings such as ER4, or ALL; everyrank check --list shows them."
            )
    defaults = {DOES_NOT_PARSE, *(rule.code for rule in RULES if rule.default)}
    chosen = set()
    for code in codes:
        wanted = _length(code, select) if select else 0 if code in defaults else -1
        if code == DOES_NOT_PARSE:
            wanted = max(wanted, 0)  # what could not be checked is said, whatever was selected
        if wanted >= 0 and wanted >= _length(code, ignore) + (not select):
            chosen.add(code)
    return frozenset(chosen)


def _length(code: str, prefixes: Iterable[str]) -> int:
    """Return how much of a code the longest of its prefixes names; -1 if there is none."""
    return max((0 if p == "ALL" else len(p) for p in prefixes if p == "ALL" or code.startswith(p)), default=-1)


def find_files(paths: Sequence[str], exclude: Sequence[str] = ()) -> Iterator[str]:
    """Yield the files to check: those given, and in folders all of a known kind, in the order of their names.

    Raises:
        UserError: A path does not exist.
    """
    seen: set[str] = set()
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path} was given, and there is no such file or folder. Fix: give paths that exist.")
        for file in [path] if os.path.isfile(path) else _files_below(path, exclude):
            if file not in seen:
                seen.add(file)
                yield file


def _files_below(folder: str, exclude: Sequence[str]) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _SKIPPED
            and not _is_excluded(os.path.join(parent, name), exclude)
        )
        for name in sorted(files):
            path = os.path.join(parent, name)
            if Path(name).suffix.lower() in KIND_OF_SUFFIX and not _is_excluded(path, exclude) and os.path.isfile(path):
                yield path


def _is_excluded(path: str, patterns: Sequence[str]) -> bool:
    path = os.path.relpath(path)
    return any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(os.path.basename(path), p) for p in patterns)


def configured(folder: str) -> Configured:
    """Return what the nearest pyproject.toml, from ``folder`` upwards, says.

    Raises:
        UserError: It cannot be read, or has keys or values that are none of ours.
    """
    for parent in (Path(folder).resolve(), *Path(folder).resolve().parents):
        path = parent / "pyproject.toml"
        if path.is_file():
            try:
                table = (
                    tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("everyrank", {}).get("check")
                )
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read: {error}. Fix: mend it, or run with --no-config.") from error
            return _validated(path, table) if table is not None else Configured()
    return Configured()


def _validated(path: Path, table: Mapping[str, Any]) -> Configured:
    known = ("select", "ignore", "exclude")
    for key, value in table.items():
        if key not in known:
            raise UserError(
                f"{_TABLE} of {path} has {key!r}, which is no key of it."
                f"{did_you_mean(key, known)} Fix: use {', '.join(known)}."
            )
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f'{_TABLE} of {path} has {key} = {value!r}. Fix: give a list of strings, such as ["ER4"].')
    return Configured(**{key: tuple(value) for key, value in table.items()})
