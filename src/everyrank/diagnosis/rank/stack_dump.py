"""Where is this process? Its Python stacks on demand, also while it is blocked inside a collective."""

from __future__ import annotations

import faulthandler
import signal
import sys
from typing import TextIO


def register_stack_dump(signum: int | None = None, file: TextIO | None = None) -> bool:
    """Print the stacks of all threads when a signal comes; the process goes on.

    Args:
        signum: The signal; by default SIGQUIT (Ctrl-\\ in a terminal), which is free: SIGUSR1 and SIGUSR2 are Slurm's
            warnings before a time limit.
        file: Where to print; needs a file descriptor. ``sys.stderr`` by default.

    Returns:
        Whether it was registered; not so on Windows.
    """
    if not hasattr(faulthandler, "register"):
        return False
    faulthandler.register(signal.SIGQUIT if signum is None else signum, file=file or sys.stderr, all_threads=True)
    return True
