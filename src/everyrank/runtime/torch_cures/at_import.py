"""A say in the import of one module."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class AtImport:
    """Lets the other finders find one module, and has a say in its import.

    Args:
        name: The module.
        execute: Called in place of what executes the module: with that, and the module.
    """

    def __init__(self, name: str, execute: Callable[[Callable[[Any], None], Any], None]) -> None:
        self.finds = name
        self._execute = execute

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.finds:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._have_a_say(spec.loader)
                return spec
        return None

    def _have_a_say(self, loader: Any) -> None:
        execute = loader.exec_module
        loader.exec_module = lambda module: self._execute(execute, module)
