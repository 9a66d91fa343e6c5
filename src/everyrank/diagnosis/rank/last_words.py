"""What a process still says when C++ ends it: gloo aborts a rank whose collective does not fit that of the others.

``std::terminate`` is about to abort; our handler runs before, in the thread that failed, while the memory that holds
the Flight Recorder is still there. The handler that was there before then prints the C++ exception and aborts as usual.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from typing import Any

_HANDLER = ctypes.CFUNCTYPE(None)
_library: Any = None
_kept: list[Any] = []  # C++ holds no reference to the function it calls


def prepare(say: Callable[[], None]) -> None:
    """Call ``say`` before this process aborts for a C++ exception that nobody caught. Once; later calls do nothing."""
    global _library
    if _library is not None or not sys.platform.startswith("linux"):
        return
    try:
        _library = ctypes.CDLL("libstdc++.so.6")
        set_terminate = _library._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        _library = False
        return
    set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def last() -> None:
        with contextlib.suppress(Exception):
            say()
        if before:
            _HANDLER(before)()

    ours = _HANDLER(last)
    _kept.append(ours)
    before = set_terminate(ctypes.cast(ours, ctypes.c_void_p))
    _kept.append(before)


def forget() -> None:
    """Put the handler back that was there before: an interpreter that ends can call no Python."""
    if _library and len(_kept) == 2:
        _library._ZSt13set_terminatePFvvE(_kept[1])
        _kept.clear()
