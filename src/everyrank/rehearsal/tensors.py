"""What a tensor answers about its device, and what moves it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from everyrank.rehearsal.devices import REAL_DEVICE, asked_by_torch, cuda_index, index_or_current
from everyrank.rehearsal.marks import claim, claimed, pin, pinned
from everyrank.rehearsal.patching import replace

_Base: Any = torch._C.TensorBase
_REAL_TO = _Base.to
_CPU = REAL_DEVICE("cpu")
# Methods that return a copy on the tensor's own device, and are often followed by a look at it.
_STAYS = ("bfloat16", "bool", "clone", "contiguous", "double", "float", "half", "int", "long")


def replace_tensor_methods() -> None:
    """Replace the properties and methods of ``torch.Tensor`` that tell, take or change a device."""
    tensor: Any = torch.Tensor
    tensor.device = property(_device)
    tensor.is_cuda = property(_is_cuda)
    tensor.is_cpu = property(_is_cpu)
    for name, method in {
        "get_device": _get_device,
        "to": _to,
        "cuda": _cuda,
        "cpu": _cpu,
        "type": _type,
        "numpy": _of_the_cpu(_Base.numpy),
        "__array__": _of_the_cpu(torch.Tensor.__array__),
        "pin_memory": _pin_memory,
        "is_pinned": _is_pinned,
        "record_stream": _record_stream,
    }.items():
        replace(tensor, name, method)
    for name in _STAYS:
        replace(tensor, name, _staying(getattr(_Base, name)))
    torch._C._nn._parse_to = _parse_to


def _device(tensor: Any) -> Any:
    real = _Base.device.__get__(tensor)
    if asked_by_torch():
        return real
    index = claimed(tensor)
    return real if index is None else REAL_DEVICE("cuda", index)


def _is_cuda(tensor: Any) -> bool:
    return not asked_by_torch() and claimed(tensor) is not None


def _is_cpu(tensor: Any) -> bool:
    real = bool(_Base.is_cpu.__get__(tensor))
    return real if asked_by_torch() else real and claimed(tensor) is None


def _get_device(tensor: Any) -> int:
    index = None if asked_by_torch() else claimed(tensor)
    return int(_Base.get_device(tensor)) if index is None else index


def move(tensor: Any, index: int, **options: Any) -> Any:
    """A copy of a tensor on ``cuda:index``; the tensor itself if it is there already and nothing else is asked."""
    if claimed(tensor) == index:
        return _keep(tensor, _REAL_TO(tensor, _CPU, **options))
    return claim(_REAL_TO(tensor, _CPU, **{**options, "copy": True}), index)


def _keep(tensor: Any, result: Any) -> Any:
    """Mark what was made of a tensor as being where the tensor is."""
    index = claimed(tensor)
    return result if index is None else claim(result, index)


@functools.wraps(_REAL_TO)
def _to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """``to(device, dtype, ...)``, ``to(dtype, ...)`` and ``to(other, ...)``."""
    first = args[0] if args else kwargs.get("device", kwargs.get("other"))
    if first is None or isinstance(first, torch.dtype):
        return _keep(tensor, _REAL_TO(tensor, *args, **kwargs))
    names = ["other", "non_blocking", "copy"]
    if not isinstance(first, torch.Tensor):
        names = ["device", "dtype", "non_blocking", "copy"]
    options = {**dict(zip(names, args, strict=False)), **kwargs}
    index = claimed(first) if isinstance(first, torch.Tensor) else cuda_index(first)
    if index is None:
        if claimed(tensor) is not None and isinstance(first, str | REAL_DEVICE):
            options["copy"] = True  # a real move; a copy also where torch's own code asks, and thinks it is on the CPU
        return _REAL_TO(tensor, options.pop("other", None) if "other" in options else options.pop("device"), **options)
    other = options.pop("other", None)
    if other is not None:
        options["dtype"] = other.dtype
    options.pop("device", None)
    return move(tensor, index, **options)


@functools.wraps(_Base.cuda)
def _cuda(
    tensor: Any, device: Any = None, non_blocking: bool = False, memory_format: Any = torch.preserve_format
) -> Any:
    return move(tensor, index_or_current(device), memory_format=memory_format)


@functools.wraps(_Base.cpu)
def _cpu(tensor: Any, memory_format: Any = torch.preserve_format) -> Any:
    return _REAL_TO(tensor, _CPU, copy=claimed(tensor) is not None, memory_format=memory_format)


@functools.wraps(_Base.type)
def _type(tensor: Any, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    """``type()`` names ``torch.cuda.FloatTensor``, and ``type(torch.cuda.FloatTensor)`` moves."""
    if dtype is None:
        name = str(_Base.type(tensor))
        moved = not asked_by_torch() and claimed(tensor) is not None
        return name.replace("torch.", "torch.cuda.", 1) if moved else name
    name = dtype if isinstance(dtype, str) else f"{getattr(dtype, '__module__', '')}.{getattr(dtype, '__name__', '')}"
    if not isinstance(dtype, torch.dtype) and name.startswith("torch.cuda."):
        return move(_Base.type(tensor, name.replace("torch.cuda.", "torch.", 1)), index_or_current())
    return _keep(tensor, _Base.type(tensor, dtype, non_blocking, **kwargs))


def _of_the_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def convert(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if not asked_by_torch() and (index := claimed(tensor)) is not None:
            raise TypeError(
                f"can't convert cuda:{index} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return original(tensor, *args, **kwargs)

    return convert


@functools.wraps(_Base.pin_memory)
def _pin_memory(tensor: Any, device: Any = None) -> Any:
    return tensor if pinned(tensor) else pin(_Base.clone(tensor))


@functools.wraps(_Base.is_pinned)
def _is_pinned(tensor: Any, device: Any = None) -> bool:
    return pinned(tensor)


@functools.wraps(_Base.record_stream)
def _record_stream(tensor: Any, stream: Any) -> None:
    """Nothing is asynchronous here, so no memory can be reused too early."""


def _staying(original: Any) -> Any:
    @functools.wraps(original)
    def stay(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return _keep(tensor, original(tensor, *args, **kwargs))

    return stay


_REAL_PARSE_TO: Any = torch._C._nn._parse_to


def _parse_to(*args: Any, **kwargs: Any) -> Any:
    """What ``Module.to`` and RNN's inputs were asked for; there an integer is a CUDA device."""
    if args and isinstance(args[0], int) and not isinstance(args[0], bool):
        args = (REAL_DEVICE("cuda", args[0]), *args[1:])
    if isinstance(kwargs.get("device"), int):
        kwargs["device"] = REAL_DEVICE("cuda", kwargs["device"])
    if args and isinstance(args[0], torch.Tensor) and (index := claimed(args[0])) is not None:
        args = (REAL_DEVICE("cuda", index), args[0].dtype, *args[1:])
    return _REAL_PARSE_TO(*args, **kwargs)
