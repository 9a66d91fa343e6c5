"""Passing on, once, the signals that reach the launching process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Forwarder:
    """What the launching process was told while its ranks ran."""

    def __init__(self, send: Callable[[int], None], kill: Callable[[], None]) -> None:
        self.signum: int | None = None
        self._send = send
        self._kill = kill

    def __call__(self, signum: int, _frame: Any) -> None:
        """Send the signal on; a second Ctrl-C ends everything at once."""
        if self.signum == signal.SIGINT and signum == signal.SIGINT:
            self._kill()
            return
        self.signum = signum
        self._send(signum)


@contextlib.contextmanager
def forwarded(send: Callable[[int], None], kill: Callable[[], None]) -> Iterator[Forwarder]:
    """Pass SIGTERM, Ctrl-C, SIGHUP, SIGUSR1 and SIGUSR2 on to the ranks while the block runs.

    The ranks live in a process group of their own, so a Ctrl-C typed in a terminal reaches them through here alone.

    Args:
        send: Passes one signal on.
        kill: Ends everything at once.
    """
    forwarder = Forwarder(send, kill)
    if threading.current_thread() is not threading.main_thread():
        yield forwarder
        return
    names = [name for name in _FORWARDED if hasattr(signal, name)]
    previous = {name: signal.signal(getattr(signal, name), forwarder) for name in names}
    try:
        yield forwarder
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)
