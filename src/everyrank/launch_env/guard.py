"""``python -I -S guard.py PARENT_PID PROGRAM [ARG ...]``: become PROGRAM, and end when the parent (0: any) ends.

A Python program, and those that it starts, get the ``sitecustomize`` of ``startup``. Run as a plain file, so that
a rank of an outside program costs one bare interpreter start and no import of everyrank.
"""

import ctypes
import os
import signal
import sys

GUARD = os.path.abspath(__file__)
STARTUP = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "startup")


def add_startup(python_path: str) -> str:
    """``PYTHONPATH`` with the folder of our ``sitecustomize`` before it."""
    folders = python_path.split(os.pathsep) if python_path else []
    return os.pathsep.join([STARTUP, *(folder for folder in folders if folder != STARTUP)])


if __name__ == "__main__":
    parent_pid, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        if parent_pid and os.getppid() != parent_pid:
            sys.exit(1)
    os.environ["PYTHONPATH"] = add_startup(os.environ.get("PYTHONPATH", ""))
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"error: cannot run {program[0]!r}: {error.strerror}")
