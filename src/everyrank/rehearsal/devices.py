"""Which CUDA devices a rehearsal shows, which one is current, and which one a program means."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from everyrank.errors import LaunchEnvironmentError
from everyrank.launch_env.detection import detect
from everyrank.rehearsal import DEVICES

REAL_DEVICE = torch.device
# Parts of torch that act for the program, and so must hear of the rehearsed devices.
_FOR_THE_PROGRAM = ("torch.distributed.run", "torch.distributed.launch")


class _State:
    current = 0
    count = 0  # fixed by the first use of a device, as CUDA does
    forked = False


# Launchers that do not say how many ranks a machine has, or programs that set RANK and the like themselves.
_TELL_NO_NUMBER = ("python", "environment")


def _after_fork() -> None:
    _State.forked = in_use()


os.register_at_fork(after_in_child=_after_fork)


def asked_by_torch(depth: int = 2) -> bool:
    """Whether torch's own code asks: it must hear the truth, for what it does next happens on the CPU."""
    name = sys._getframe(depth).f_globals.get("__name__", "")
    return (name == "torch" or name.startswith("torch.")) and name not in _FOR_THE_PROGRAM


def count() -> int:
    """Devices shown: one for each rank of this machine, fewer where CUDA_VISIBLE_DEVICES names fewer."""
    if _State.count:
        return _State.count
    shown, named = 1, int(os.environ.get(DEVICES) or 0)
    try:
        found = detect()
        shown = found.local_world_size
        if found.launcher in _TELL_NO_NUMBER:
            shown = max(shown, named)
    except LaunchEnvironmentError:  # the program sets RANK and the like itself, one after the other
        shown = named or 1
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if visible and visible[0].strip() != "-1":
        shown = min(shown, len(visible))
    return shown


def current() -> int:
    """Index of the current device."""
    return _State.current


def exchange(index: int) -> int:
    """Make a device the current one, and return the one that was; a negative index changes nothing."""
    previous = _State.current
    if index >= 0:
        _State.current = use(index)
    return previous


def use(index: int) -> int:
    """Check an index as CUDA does before it does anything on the device, and return it.

    Raises:
        torch.AcceleratorError: There is no such device.
        RuntimeError: This process was forked from one that used CUDA already.
    """
    if not 0 <= index < count():
        raise torch.AcceleratorError(
            "CUDA error: invalid device ordinal\n"
            f"GPU device may be out of range, do you have enough GPUs? cuda:{index} was asked for, and everyrank's "
            f"rehearsal shows {count()}, one for each rank of this machine."
        )
    if _State.forked:
        raise RuntimeError(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
            "'spawn' start method"
        )
    _State.count = count()
    return index


def in_use() -> bool:
    """Whether this process used a device already."""
    return _State.count > 0


def cuda_index(device: Any) -> int | None:
    """The index of the CUDA device that is meant, checked; None for a device that is not CUDA's.

    Args:
        device: What a program may pass: an index, a string, a device, or None.
    """
    if device is None or isinstance(device, bool):
        return None
    if isinstance(device, str):
        if not device.startswith("cuda"):
            return None
        device = REAL_DEVICE(device)
    if isinstance(device, REAL_DEVICE):
        if device.type != "cuda":
            return None
        device = device.index
        return use(_State.current if device is None else device)
    if isinstance(device, int):
        return use(device)
    index = getattr(device, "idx", None)  # a ``with torch.cuda.device(...)``
    return use(index) if isinstance(index, int) else None


def index_or_current(device: Any = None) -> int:
    """As :func:`cuda_index`; the current device where nothing of CUDA's is named."""
    index = cuda_index(device)
    return _State.current if index is None else index


class _DeviceMeta(type):
    """Lets real devices be instances of the class that stands for ``torch.device``."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, REAL_DEVICE)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is REAL_DEVICE or super().__subclasscheck__(subclass)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("device")
        if isinstance(first, int) and not isinstance(first, bool) and "type" not in kwargs:
            return REAL_DEVICE("cuda", first)  # torch.device(0) is the current kind of accelerator
        return REAL_DEVICE(*args, **kwargs)


class Device(metaclass=_DeviceMeta):
    """Stands for ``torch.device``, which cannot be told that there is an accelerator."""


Device.__name__ = Device.__qualname__ = "device"
Device.__module__ = "torch"
