"""Outside programs that must end with the process that started them."""

from __future__ import annotations

import os
import sys


def guarded(argv: tuple[str, ...], parent_pid: int | None = None) -> tuple[str, ...]:
    """Put a small launcher before ``argv`` that asks the kernel to end the program with the process that starts it.

    Args:
        argv: The program and its arguments.
        parent_pid: Pid of that process, this one by default; 0 if it is not known yet.
    """
    guard = os.path.join(os.path.dirname(__file__), "guard.py")
    return (sys.executable, "-I", "-S", guard, str(os.getpid() if parent_pid is None else parent_pid), *argv)
