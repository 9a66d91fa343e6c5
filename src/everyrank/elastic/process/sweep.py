"""Ending whatever a run has left: loader workers, children of a rank, a child that holds an inherited pipe.

What a rank starts carries the rank's session, or the run's mark in the environment it was started with, wherever it has
been reparented. ``python -I -S sweep.py MARK`` reads sessions from its standard input, and does it when that ends,
which is when the launching process ends, however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MARK = "EVERYRANK_LAUNCH_ID"
SCRIBE = "everyrank-scrib"  # what the kernel calls the process that reads a rank's output: 15 bytes at most
_PATIENCE_S = 2.5
_SCRIBES_S = 2.0


def sweep(mark: str = "", sessions: Iterable[int] = ()) -> None:
    """Kill every process of these sessions, and every one that was started with this mark, until none is left.

    A scribe ends when the last writer has: it is left the time to write down what the ranks have said.
    """
    wanted, entry = set(sessions), f"{MARK}={mark}".encode()
    begin = time.monotonic()
    while (passed_s := time.monotonic() - begin) < _PATIENCE_S:
        found = {pid: name for pid, name, session in _living() if session in wanted or (mark and _carries(pid, entry))}
        if not found:
            return
        for pid, name in found.items():
            if name == SCRIBE and passed_s < _SCRIBES_S:
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.02)


def _living() -> Iterator[tuple[int, str, int]]:
    """Pid, name and session of every process but this one and those that have ended (Linux; elsewhere none)."""
    for name in os.listdir("/proc") if sys.platform.startswith("linux") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                before, _, after = file.read().rpartition(b")")
                state, _, _, session = after.split()[:4]
        except (OSError, ValueError):
            continue
        if state not in (b"Z", b"X"):
            yield int(name), os.fsdecode(before.partition(b"(")[2]), int(session)


def _carries(pid: int, entry: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return entry in file.read().split(b"\0")
    except OSError:
        return False


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    sessions = b""
    while chunk := os.read(0, 4096):
        sessions += chunk
    sweep(sys.argv[1], [int(session) for session in sessions.split()])
