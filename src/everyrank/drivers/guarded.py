"""Outside programs that must end with the process that started them."""

from __future__ import annotations

import os
import sys


def guarded(argv: tuple[str, ...]) -> tuple[str, ...]:
    """Put a small launcher before ``argv`` that asks the kernel to end the program with this process."""
    guard = os.path.join(os.path.dirname(__file__), "guard.py")
    return (sys.executable, "-I", "-S", guard, str(os.getpid()), *argv)
