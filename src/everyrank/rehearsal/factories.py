"""Functions that make tensors: one for ``device="cuda"`` lives in CPU memory and reads back ``cuda:0``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.jit._builtins as torchscript
from torch.utils._device import DeviceContext, _device_constructors

from everyrank.rehearsal.devices import REAL_DEVICE, cuda_index
from everyrank.rehearsal.marks import claim, claimed, pin
from everyrank.rehearsal.patching import replace

_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
_MAY_ALIAS = ("as_tensor", "asarray")
_CPU = REAL_DEVICE("cpu")


def replace_factories() -> None:
    """Replace every function of torch that takes ``device=`` and makes a tensor."""
    constructors = _device_constructors()  # asked for now, so that torch keeps the originals there
    for name in sorted(f.__name__ for f in constructors):
        for owner in (torch, torch.fft, torch.nested):
            if getattr(owner, name, None) in constructors:
                _replace_factory(owner, name, _aliasing if name in _MAY_ALIAS else _making)
    _replace_factory(torch, "normal", _making)
    for name in _LIKE:
        _replace_factory(torch, name, _making_like)
    for name in _NEW:
        replace(torch.Tensor, name, _making_like(getattr(torch.Tensor, name)))
    replace(DeviceContext, "__torch_function__", _default_device)


def _replace_factory(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    made = wrapper(original)
    replace(owner, name, made)
    script_name = torchscript._find_builtin(original)
    if script_name is not None:
        torchscript._register_builtin(made, script_name)


def _making(original: Any) -> Any:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        index, pinned = _prepare(kwargs)
        return _finish(original(*args, **kwargs), index, pinned)

    return make


def _making_like(original: Any) -> Any:
    @functools.wraps(original)
    def make(like: Any, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.get("device") is not None
        index, pinned = _prepare(kwargs)
        return _finish(original(like, *args, **kwargs), index if named else claimed(like), pinned)

    return make


def _aliasing(original: Any) -> Any:
    """``as_tensor(data, device="cuda")`` copies unless the data is there already."""

    @functools.wraps(original)
    def make(data: Any, *args: Any, **kwargs: Any) -> Any:
        index, pinned = _prepare(kwargs)
        result = original(data, *args, **kwargs)
        if index is not None and claimed(result) != index:
            result = result.clone()
        return _finish(result, index, pinned)

    return make


def _prepare(kwargs: dict[str, Any]) -> tuple[int | None, bool]:
    """Make the keyword arguments such as a CPU build takes; which device and whether pinned memory was asked for."""
    index = cuda_index(kwargs.get("device"))
    if index is not None:
        kwargs["device"] = _CPU
    return index, bool(kwargs.pop("pin_memory", False))


def _finish(result: Any, index: int | None, pinned: bool) -> Any:
    if index is not None:
        claim(result, index)
    return pin(result) if pinned else result


def _default_device(mode: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``with torch.device("cuda")`` and ``torch.set_default_device``, which keep the original constructors."""
    kwargs = kwargs or {}
    if function not in _device_constructors() or kwargs.get("device") is not None:
        return function(*args, **kwargs)
    index = cuda_index(mode.device)
    kwargs["device"] = mode.device if index is None else _CPU
    result = function(*args, **kwargs)
    return result if index is None else claim(result, index)
