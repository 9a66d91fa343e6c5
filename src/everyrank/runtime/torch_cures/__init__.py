"""Cures of torch for any program: leaving a gloo group without its deadlock, listening on loopback, a quicker start.

This package needs neither torch nor the rest of everyrank, and its modules name each other by relative imports:
``startup/sitecustomize.py`` loads it by its path, in every Python program that we start. Each pays for what is imported
here: there is little, and the rest is imported where it is used.
"""

from __future__ import annotations

import gc
import sys

from .at_import import AtImport
from .compiler import compile_on_demand
from .groups import cure_groups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def install() -> None:
    """Cure this process: now what it has imported of torch, else right after that import."""
    for name, cure in (("torch.distributed.distributed_c10d", cure_groups), ("torch", compile_on_demand)):
        module = sys.modules.get(name)
        if module is not None:
            cure(module)
        elif not any(getattr(finder, "finds", None) == name for finder in sys.meta_path):
            sys.meta_path.insert(0, AtImport(name, _cured_by(cure)))


def _cured_by(cure: Callable[[Any], None]) -> Callable[[Callable[[Any], None], Any], None]:
    def execute_and_cure(execute: Callable[[Any], None], module: Any) -> None:
        _execute_quickly(execute, module)
        cure(module)

    return execute_and_cure


def _execute_quickly(execute: Callable[[Any], None], module: Any) -> None:
    """Execute a module of torch's without what takes a fifth of the time, and leaves nothing.

    That is a search for garbage, which an import does not make; and, for each operator that is registered, for the text
    of the line, of which torch notes the file and the number, and through the files of all modules for the one whose
    frame that is.
    """
    import inspect

    was_enabled, frame_info, module_of = gc.isenabled(), inspect.getframeinfo, inspect.getmodule

    def place(frame: Any, context: int = 1) -> Any:
        is_torchs = sys._getframe(1).f_globals.get("__name__") == "torch._library.utils"
        return frame_info(frame, 0 if is_torchs else context)

    def module_at(object: Any, _filename: str | None = None) -> Any:
        is_torchs = sys._getframe(1).f_globals.get("__name__") == "torch.library"
        named = sys.modules.get(object.f_globals.get("__name__", "")) if is_torchs else None
        return named or module_of(object, _filename)

    gc.disable()
    inspect.getframeinfo, inspect.getmodule = place, module_at
    try:
        execute(module)
    finally:
        inspect.getframeinfo, inspect.getmodule = frame_info, module_of
        if was_enabled:
            if not gc.get_freeze_count():  # to the oldest generation, else it is searched three times soon
                gc.freeze()
                gc.unfreeze()
            gc.enable()
