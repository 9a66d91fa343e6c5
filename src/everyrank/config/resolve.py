"""Objects by their full dotted name: ``torch.optim.AdamW``, ``__main__.compute_loss``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from everyrank.errors import ConfigError, did_you_mean


def import_object(path: str) -> Any:
    """Return the object with the full name ``path``, importing only the modules that the name goes through.

    ``__main__.name`` finds ``name`` in the running script, also in a process that was spawned from it, where Python
    keeps the script under ``__mp_main__``.

    Args:
        path: ``package.module.name``, or ``package.module.Class.attribute``.

    Raises:
        ConfigError: If the path has no dot, a module cannot be found or fails at import, or an attribute is missing
            (the message names the nearest one).
    """
    if not isinstance(path, str) or "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(
            f"{path!r} is not the full name of an object. Write it as package.module.name, e.g. torch.optim.AdamW."
        )
    parts = path.split(".")
    if parts[0] == "__main__":
        module, rest = _main_module(parts[1]), parts[1:]
    else:
        module, rest = _longest_module(path, parts)
    target: Any = module
    for number, name in enumerate(rest):
        try:
            target = getattr(target, name)
        except AttributeError:
            owner = ".".join([*parts[: len(parts) - len(rest)], *rest[:number]])
            kind = "module" if isinstance(target, ModuleType) else "object"
            raise ConfigError(
                f"{path!r} was given, but {kind} {owner!r} has no attribute {name!r}."
                f"{did_you_mean(name, [known for known in dir(target) if not known.startswith('_')])}"
            ) from None
    return target


def construct(key: str, kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``kind(*args, **kwargs)``, an object that the configuration asks for.

    Args:
        key: Where the configuration names the class, for the message.
        kind: The class.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Raises:
        ConfigError: If the class refuses its arguments.
    """
    try:
        return kind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        name = getattr(kind, "__name__", kind)
        raise ConfigError(f"{key} {name} refused its arguments: {error}.") from error


def object_path(target: Any) -> str | None:
    """Return the full name that ``import_object`` finds ``target`` under, or None if it has none."""
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or "<" in name:
        return None
    return f"{'__main__' if module == '__mp_main__' else module}.{name}"


def _main_module(name: str) -> ModuleType:
    # While a spawned process is still running the script's top level, `__main__` is the spawner's own bootstrap and the
    # script is `__mp_main__`; afterwards both are the script.
    modules = [sys.modules[key] for key in ("__mp_main__", "__main__") if key in sys.modules]
    return next((module for module in modules if hasattr(module, name)), modules[0])


def _longest_module(path: str, parts: list[str]) -> tuple[ModuleType, list[str]]:
    """Import the longest leading part of ``path`` that is a module; return it and the attribute names left."""
    module: ModuleType | None = None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        # A module that is a plain attribute (not a submodule) ends the walk: the rest are attributes.
        if module is not None and (not hasattr(module, "__path__") or importlib.util.find_spec(name) is None):
            return module, parts[depth - 1 :]
        if module is None and name not in sys.modules and importlib.util.find_spec(name) is None:
            known = {key.partition(".")[0] for key in sys.modules} | set(sys.stdlib_module_names)
            raise ConfigError(
                f"{path!r} was given, but there is no module {name!r} here."
                f"{did_you_mean(name, known)} Install it, or add its folder to PYTHONPATH."
            )
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise ConfigError(
                f"{path!r} was given, but importing {name!r} failed with {type(error).__name__}: {error}."
            ) from error
    raise ConfigError(f"{path!r} is a module. Name a class or a function in it.")
