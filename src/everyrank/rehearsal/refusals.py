"""What cannot be rehearsed is said so, by name."""

from __future__ import annotations

import functools
import sys
from typing import Any, NoReturn

from everyrank.errors import RehearsalError

# Packages that are CUDA kernels, or write them. Where one is installed, its import is left alone.
CUDA_PACKAGES = ("apex", "cupy", "flash_attn", "transformer_engine", "triton")

_IMPORT_SYSTEM = ("importlib", "_frozen_importlib", "everyrank.rehearsal")


class RehearsalImportError(ModuleNotFoundError, RehearsalError):
    """A package of CUDA kernels; a program that can do without it catches this as any missing package."""


def refuse(what: str, why: str = "it runs on a GPU only") -> NoReturn:
    """Raise the error for something that has no meaning on a CPU."""
    raise RehearsalError(
        f"{what} was used, and cannot be rehearsed on a CPU: {why}. "
        "Fix: guard it in the program, choose a setting that does without it, or run it on a GPU."
    )


def refuse_import(name: str) -> None:
    """Raise the error for a package that is not installed and would be of no use on a CPU.

    Raises:
        RehearsalImportError: Unless it is only looked for, with ``importlib.util.find_spec``.
    """
    frame = sys._getframe(1)
    while (module := frame.f_globals.get("__name__", "")).startswith(_IMPORT_SYSTEM) and frame.f_back is not None:
        if module == "importlib.util":
            return
        frame = frame.f_back
    raise RehearsalImportError(
        f"{name} was imported, and cannot be rehearsed on a CPU: it is made of CUDA kernels. "
        "Fix: guard the import in the program, choose a setting that does without it, or run it on a GPU.",
        name=name,
    )


def refusing(what: str) -> Any:
    """A function that raises the error when it is called."""

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(what)

    refused.__name__ = what.rpartition(".")[2]
    return refused


def refuse_cuda_extensions() -> None:
    """Refuse extensions with CUDA sources; those of C++ alone are built as usual."""
    from torch.utils import cpp_extension

    module: Any = cpp_extension
    module.CUDAExtension = refusing("torch.utils.cpp_extension.CUDAExtension")
    for name in ("load", "load_inline"):
        setattr(module, name, _without_cuda(name, getattr(module, name)))


def _without_cuda(name: str, original: Any) -> Any:
    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        sources = [*args[1:2], kwargs.get("sources", ())]
        named = [s for group in sources for s in ([group] if isinstance(group, str) else group)]
        if (
            kwargs.get("cuda_sources")
            or kwargs.get("with_cuda")
            or any(str(s).endswith((".cu", ".cuh")) for s in named)
        ):
            refuse(
                f"torch.utils.cpp_extension.{name}({args[0] if args else kwargs.get('name')!r})", "it has CUDA sources"
            )
        return original(*args, **kwargs)

    return build
