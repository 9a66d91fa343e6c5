"""Passing on, once, the signals that reach the launching process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

from everyrank.diagnosis.proc import catches, children_of

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


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
        if signum == signal.SIGHUP:
            signum = signal.SIGTERM  # the terminal is gone: the ranks save and stop
        if signum != signal.SIGQUIT:  # that one shows stacks, and the run goes on
            self.signum = signum
        self._send(signum)


@contextlib.contextmanager
def forwarded(send: Callable[[int], None], kill: Callable[[], None]) -> Iterator[Forwarder]:
    """Pass SIGTERM, Ctrl-C, SIGHUP (as SIGTERM), SIGQUIT, SIGUSR1 and SIGUSR2 on to the ranks while the block runs.

    One that this process ignores, as SIGHUP under ``nohup``, stays ignored.

    The ranks live in a process group of their own, so a Ctrl-C typed in a terminal reaches them through here alone.

    Args:
        send: Passes one signal on.
        kill: Ends everything at once.
    """
    forwarder = Forwarder(send, kill)
    if threading.current_thread() is not threading.main_thread():
        yield forwarder
        return
    heard = [signum for signum in _FORWARDED if signal.getsignal(signum) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, forwarder) for signum in heard}
    try:
        yield forwarder
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def signals_to(launcher: subprocess.Popen[bytes]) -> Callable[[int], None]:
    """Return a function that passes a signal on to an outside launcher, and SIGQUIT to the ranks under it.

    An outside launcher would end at SIGQUIT; its ranks print their stacks and go on.
    """

    def send(signum: int) -> None:
        if signum != signal.SIGQUIT:
            launcher.send_signal(signum)
            return
        for pid in children_of(launcher.pid):
            if catches(pid, signum):
                os.kill(pid, signum)

    return send
