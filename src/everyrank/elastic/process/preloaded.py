"""Modules that were imported before the ranks are forked, and whether their files have been edited since."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence


def import_all(names: Iterable[str]) -> None:
    """Import modules; one that cannot be imported is left to the ranks, which will say why."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class Preloaded:
    """What this process has imported on request, with all that came with it."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._files: dict[str, tuple[int, int]] = {}

    def has(self, names: Iterable[str]) -> bool:
        """Whether these modules were loaded, or tried, before."""
        return set(names) <= self._names

    def load(self, names: Sequence[str]) -> None:
        """Import modules, and remember the files that came with them."""
        before = set(sys.modules)
        self._names.update(names)
        import_all(names)
        for name in set(sys.modules) - before:
            path = getattr(sys.modules[name], "__file__", None)
            if path is not None:
                self._files[path] = _state(path)

    def changed(self) -> bool:
        """Whether a file of theirs is not what it was."""
        return any(_state(path) != state for path, state in self._files.items())


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
