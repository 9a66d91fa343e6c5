"""The function that a started process calls, named as text: the launching process need not import it."""

from __future__ import annotations

import importlib
from typing import Any


def call_entry(entry: str, args: tuple[Any, ...]) -> None:
    """Call ``package.module:function`` with ``args``."""
    module, _, function = entry.partition(":")
    getattr(importlib.import_module(module), function)(*args)
