"""Ranks forked from one process that has imported torch, once.

The forkserver is forked from the engine before the engine starts a thread, opens a socket or touches an accelerator,
and does nothing but fork: a rank starts in milliseconds from its warm copy of torch. The ranks are the forkserver's
children, so it alone reaps and signals them (a pid cannot be reused under our hands), and they end with it.

Not safe when a preloaded module starts threads or initialises CUDA while it is imported: set ``start_method=spawn``.
"""

from __future__ import annotations

import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from everyrank.elastic import wire
from everyrank.elastic.entry import call_entry
from everyrank.elastic.lifetime import die_with_parent
from everyrank.elastic.process.fresh import as_if_fresh
from everyrank.elastic.process.leaving import finish
from everyrank.elastic.process.preloaded import import_all
from everyrank.elastic.process.surroundings import Surroundings
from everyrank.elastic.process.sweep import MARK, sweep


@dataclass(frozen=True, kw_only=True)
class RankProcess:
    """What one rank runs.

    Attributes:
        entry: ``package.module:function``, imported in the rank.
        args: Arguments of the function.
        env: The complete environment of the rank.
        cwd: Its working directory.
        sys_path: Its module search path.
        surroundings: What it inherits from the launching process besides.
    """

    entry: str
    args: tuple[Any, ...]
    env: dict[str, str]
    cwd: str
    sys_path: list[str] = field(default_factory=list)
    surroundings: Surroundings | None = None


class Forkserver:
    """The engine's handle on its forkserver process."""

    def __init__(self, private: Iterable[int] = ()) -> None:
        """Fork it from this process; ``private`` are descriptors of this process that the ranks must not hold."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pid = os.fork()
        if pid == 0:
            try:
                for fd in (ours.detach(), *private):
                    with contextlib.suppress(OSError):  # a hook of the fork may have closed it
                        os.close(fd)
                _serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self._channel, self.pid = ours, pid
        self.exit_codes: dict[int, int] = {}
        self._new_pids: list[int] = []

    def prepare(self, entry: str) -> None:
        """Import the module of an entry, so that the ranks need not; nobody waits for it."""
        wire.send(self._channel, ("import", [entry.partition(":")[0]]))

    def fork(self, process: RankProcess, stdout: int, stderr: int) -> int:
        """Start a rank that writes to the given descriptors and return its pid."""
        wire.send(self._channel, ("fork", process), [stdout, stderr])
        return self._next_pid()

    def _next_pid(self) -> int:
        while not self._new_pids:
            self._read_one()
        return self._new_pids.pop()

    def kill(self, pid: int, signum: int) -> None:
        """Send a signal to a rank if it has not been reaped."""
        wire.send(self._channel, ("kill", pid, signum))

    def wait(self, timeout_s: float) -> bool:
        """Take in the exit codes of ranks that ended, waiting at most ``timeout_s`` for the first."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            came = False
            while selector.select(0 if came else timeout_s):
                self._read_one()
                came = True
        return came

    def _read_one(self) -> None:
        (kind, *rest), _ = wire.receive(self._channel)
        if kind == "pid":
            self._new_pids.append(rest[0])
        else:
            self.exit_codes[rest[0]] = rest[1]

    def close(self) -> None:
        """End the forkserver (and with it any rank that is left)."""
        self._channel.close()
        os.waitpid(self.pid, 0)


def _serve(channel: socket.socket) -> None:
    """Fork ranks until the engine closes the channel or dies, then end what is left of them."""
    # Signals meant for the ranks reach them through the engine, once.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_r, False)
    os.set_blocking(wake_w, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w)
    alive: set[int] = set()
    marks: set[str] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(wake_r, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            try:
                if wake_r in ready:
                    os.read(wake_r, 4096)
                    _reap(alive, marks, channel)
                if channel.fileno() in ready:
                    _answer(channel, alive, marks, [wake_r, wake_w, selector.fileno()])
            except (EOFError, OSError):
                break
    for mark in marks or {""}:
        sweep(mark, list(alive))  # each rank is the first of a session


def _reap(alive: set[int], marks: set[str], channel: socket.socket) -> None:
    for pid in list(alive):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            alive.remove(pid)
            sweep(sessions=[pid])  # a rank's children end with it
            if marks and not alive:
                sweep(marks.pop())  # also those that have left its session
            wire.send(channel, ("exit", pid, os.waitstatus_to_exitcode(status)))


def _answer(channel: socket.socket, alive: set[int], marks: set[str], private_fds: Sequence[int]) -> None:
    (kind, *rest), fds = wire.receive(channel)
    if kind == "kill":
        if rest[0] in alive:
            os.kill(rest[0], rest[1])
        return
    if kind == "import":
        import_all(rest[0])
        return
    server_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        channel.close()
        for fd in private_fds:
            os.close(fd)
        _become_rank(rest[0], fds, server_pid)
    alive.add(pid)
    if mark := rest[0].env.get(MARK):
        marks.add(mark)
    wire.close_all(fds)
    wire.send(channel, ("pid", pid))


def _become_rank(process: RankProcess, fds: Sequence[int], server_pid: int) -> None:
    """Turn a forked copy of the server into a rank, run it and exit; never returns."""
    gc.freeze()  # else the first full collection visits, and so copies, every object that came with torch
    try:
        os.setsid()  # its children can be told from others', and no terminal can stop it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        die_with_parent(server_pid)
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        wire.close_all(fds)
        os.environ.clear()
        os.environ.update(process.env)
        os.chdir(process.cwd)
        sys.path[:] = process.sys_path or sys.path
        if process.surroundings is not None:
            process.surroundings.enter()
        as_if_fresh()
        call_entry(process.entry, process.args)
    except BaseException as error:
        finish(error)
    finish(None)
