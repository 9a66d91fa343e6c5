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
_PATIENCE_S = 2.5


def sweep(mark: str = "", sessions: Iterable[int] = ()) -> None:
    """Kill every process of these sessions, and every one that was started with this mark, until none is left."""
    wanted, entry = set(sessions), f"{MARK}={mark}".encode()
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        found = [pid for pid, session in _living() if session in wanted or (mark and _carries(pid, entry))]
        if not found:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.02)


def _living() -> Iterator[tuple[int, int]]:
    """Pid and session of every process but this one and those that have ended (Linux; elsewhere none)."""
    for name in os.listdir("/proc") if sys.platform.startswith("linux") else ():
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, _, _, session = file.read().rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if state not in (b"Z", b"X"):
            yield int(name), int(session)


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
