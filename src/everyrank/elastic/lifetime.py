"""A process that must not outlive the one that started it.

A launcher that is killed with SIGKILL cannot end its ranks, and ranks that train on without it hold the GPUs. The
kernel can end them: ``prctl(PR_SET_PDEATHSIG)`` sends a signal to a process when the thread that forked it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None, death_signal: int = signal.SIGKILL) -> None:
    """Ask the kernel to end this process when its parent ends (Linux; a no-op elsewhere).

    Args:
        parent_pid: The parent that was expected. If it died before the request was made, this process exits at once:
            the kernel sends nothing for a parent that is already gone.
        death_signal: The signal to be sent.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)
