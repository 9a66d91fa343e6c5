"""Mixed precision and compilation: autocast and GradScaler for CUDA work on the CPU; what is compiled runs eagerly."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
from torch.amp import autocast_mode, grad_scaler

from everyrank.rehearsal.devices import asked_by_torch
from everyrank.rehearsal.patching import replace


def replace_amp() -> None:
    """Replace autocast, GradScaler and the functions that tell of them."""
    autocast: Any = autocast_mode.autocast
    replace(autocast, "__init__", _autocast_init(autocast.__init__))
    scaler: Any = grad_scaler.GradScaler
    replace(scaler, "__init__", _scaler_init(scaler.__init__))
    for name in ("custom_fwd", "custom_bwd"):
        custom = _custom(getattr(autocast_mode, name))
        replace(autocast_mode, name, custom)
        setattr(torch.amp, name, custom)
        setattr(torch.cuda.amp, name, functools.partial(custom, device_type="cuda"))
    replace(torch, "is_autocast_enabled", _of_cpu(torch.is_autocast_enabled))
    for name in ("get_autocast_dtype", "set_autocast_dtype", "set_autocast_enabled"):
        replace(torch, name, _of_cpu(getattr(torch, name)))
    replace(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu"))


def _autocast_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16  # CUDA's default
            enabled = enabled and dtype in (torch.float16, torch.bfloat16)
        original(self, device_type, dtype, enabled, cache_enabled)

    return init


def _scaler_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device == "cuda" else device, *args, **kwargs)

    return init


def _custom(original: Any) -> Any:
    """``custom_fwd`` and ``custom_bwd`` look at the tensors' device, which they hear is the CPU."""

    @functools.wraps(original)
    def custom(function: Any = None, *, device_type: str, **options: Any) -> Any:
        return original(function, device_type="cpu" if device_type == "cuda" else device_type, **options)

    return custom


def _of_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def call(*args: Any) -> Any:
        if args and args[0] == "cuda":
            args = ("cpu", *args[1:])
        if not args and not asked_by_torch():
            args = ("cpu",)
        return original(*args)

    return call


def replace_compile() -> None:
    """``torch.compile`` returns what it would, a module with its ``_orig_mod``, that runs eagerly."""
    replace(torch, "compile", _compile)
    torch.nn.Module.compile = lambda self, *args, **kwargs: _say_once()  # type: ignore[method-assign]


def _compile(model: Any = None, **options: Any) -> Any:
    _say_once()
    if model is None:
        return _compile
    if not isinstance(model, torch.nn.Module):
        return model
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule(model, _eager())


def _eager() -> Any:
    """What stands for a compiler: it gives back what it is given."""
    return lambda function: function


class _Said:
    compile = False


def _say_once() -> None:
    if not _Said.compile and os.environ.get("RANK", "0") == "0":
        print("rehearsal: torch.compile was called; the rehearsal runs the program's code eagerly.", file=sys.stderr)
    _Said.compile = True
