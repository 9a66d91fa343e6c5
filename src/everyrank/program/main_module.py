"""Running a script or module as ``__main__`` of this process, as ``python train.py`` and ``python -m module`` do.

What a program can see of it is the same: ``sys.argv``, ``sys.path[0]``, ``__file__``, ``__spec__`` and ``__main__``,
which is what multiprocessing's ``spawn`` imports again in its children, and where pickle looks for its classes.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import os
import runpy
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

_KEPT: list[ModuleType] = []  # what was __main__ before: its globals must live as long as its frames


def fresh_path() -> list[str]:
    """``sys.path`` as every interpreter starts with it, without the entry that is its script's own.

    To be asked for at the start of a process, before anything is added.
    """
    return list(sys.path if sys.flags.safe_path else sys.path[1:])


def run_script(argv: Sequence[str]) -> None:
    """Run the file ``argv[0]`` as ``__main__``.

    Args:
        argv: What ``sys.argv`` is to be. The file may be a folder or an archive that holds a ``__main__.py``.

    Raises:
        BaseException: Whatever the script raises.
    """
    path = argv[0]
    sys.argv = list(argv)
    sys.orig_argv = [sys.executable, *argv]
    if os.path.isdir(path) or not path.endswith(".py"):
        runpy.run_path(path, run_name="__main__")
        return
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    file = os.path.join(os.getcwd(), path)
    with io.open_code(file) as source:
        code = compile(source.read(), file, "exec", dont_inherit=True)
    loader = importlib.machinery.SourceFileLoader("__main__", file)
    _run(code, __file__=file, __cached__=None, __package__=None, __spec__=None, __loader__=loader)


def run_module(argv: Sequence[str]) -> None:
    """Run the module ``argv[0]``, or the ``__main__`` of a package, as ``__main__``.

    Raises:
        ImportError: There is no such module.
        BaseException: Whatever the module raises.
    """
    name, *arguments = argv
    sys.argv = ["-m", *arguments]  # what the packages above it see while they are imported
    sys.orig_argv = [sys.executable, "-m", *argv]
    sys.path.insert(0, os.getcwd())
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name = f"{name}.__main__"
        spec = importlib.util.find_spec(name)
    loader = spec.loader if spec is not None else None
    code = loader.get_code(name) if hasattr(loader, "get_code") else None  # type: ignore[union-attr]
    if spec is None or code is None:
        raise ImportError(f"No module named {name}", name=name)
    sys.argv[0] = str(spec.origin)
    _run(code, __file__=spec.origin, __cached__=spec.cached, __package__=spec.parent, __spec__=spec, __loader__=loader)


def _run(code: CodeType, **names: object) -> None:
    _KEPT.append(sys.modules["__main__"])
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(names, __annotations__={}, __builtins__=sys.modules["builtins"])
    exec(code, main.__dict__)
