"""Put one thing in the place of another, under every name it goes by."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

_REPLACED: dict[int, tuple[Any, Any]] = {}  # by the identity of the original; it holds the original, so that it lives


def replace(owner: Any, name: str, new: Any) -> Any:
    """Set ``owner.name`` and return what was there, or None.

    A function becomes an object of its own under each name: torch's compiler refuses one object under two names.
    """
    old = getattr(owner, name, None)
    if isinstance(new, FunctionType):
        new = _own(new, name)
    setattr(owner, name, new)
    if callable(old) and old is not new:
        _REPLACED[id(old)] = (old, new)
    return old


def _own(function: FunctionType, name: str) -> FunctionType:
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__doc__, copy.__module__, copy.__qualname__ = function.__doc__, function.__module__, function.__qualname__
    return copy


def replace_elsewhere() -> None:
    """Replace the same functions and classes in every module that imported them by name."""
    for module_name, module in list(sys.modules.items()):
        # The C extensions keep their own functions: what stands in for one calls it there.
        if module is None or module_name.startswith(("torch._C", "everyrank.rehearsal")):
            continue
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            found = _REPLACED.get(id(value))
            if found is not None and found[0] is value:
                names[name] = found[1]
