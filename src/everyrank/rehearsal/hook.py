"""Switch the rehearsal on right after the first ``import torch`` of a process."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from everyrank.rehearsal.refusals import CUDA_PACKAGES, refuse_import

# What is done after which module was imported: the name of a function, imported when it is needed.
_AFTER = {
    "torch": "everyrank.rehearsal.switch:switch_on",
    "torch.utils.cpp_extension": "everyrank.rehearsal.refusals:refuse_cuda_extensions",
    "torch.distributed.fsdp": "everyrank.rehearsal.modules:fsdp_on_cpu",
    "torch.nn.attention": "everyrank.rehearsal.modules:attention_on_cpu",
}


class _Finder:
    """Lets the other finders find a module, and has something done after its import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _AFTER and name not in CUDA_PACKAGES:
            return None
        spec = self._others(name, path, target)
        if spec is None and name in CUDA_PACKAGES:
            refuse_import(name)
        if spec is not None and spec.loader is not None and name in _AFTER:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(_execute, loader.exec_module)
        return spec

    def _others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                return spec
        return None


def _execute(execute: Any, module: ModuleType) -> None:
    execute(module)
    _after(module.__name__)


def _after(name: str) -> None:
    room, _, function = _AFTER[name].partition(":")
    getattr(importlib.import_module(room), function)()


def install_hook() -> None:
    """Rehearse from the first ``import torch`` on; at once if it was imported already. Again is harmless."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _AFTER:
        if name in sys.modules:
            _after(name)
