"""Outside programs that must end with the process that started them."""

from __future__ import annotations

import os
import sys

from everyrank.launch_env.guard import GUARD


def guarded(argv: tuple[str, ...], parent_pid: int | None = None) -> tuple[str, ...]:
    """Put a small launcher before ``argv`` that asks the kernel to end the program with the process that starts it.

    Args:
        argv: The program and its arguments.
        parent_pid: Pid of that process, this one by default; 0 if it is not known yet.
    """
    return (sys.executable, "-I", "-S", GUARD, str(os.getpid() if parent_pid is None else parent_pid), *argv)
