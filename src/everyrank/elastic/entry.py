"""The function that a started process calls, named as text: the launching process need not import it."""

from __future__ import annotations

import importlib
from typing import Any

from everyrank.runtime import no_terminal, torch_cures


def call_entry(entry: str, args: tuple[Any, ...]) -> None:
    """Call ``package.module:function`` with ``args``."""
    torch_cures.install()
    no_terminal.install()
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(*args)
