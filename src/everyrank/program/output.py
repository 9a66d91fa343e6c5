"""What a program on a rank prints: on the console, where that is wanted, and whole in the rank's log.

A program may write to the descriptors 1 and 2 by any means, and so may its children. So each rank's two streams are
pipes, which a small process reads: the scribe. It belongs to no process group of the run, is sent no signal, and ends
when the last writer has closed its end: what was printed before a SIGKILL is in the log as well. It holds a lock on the
log until then, for which the launching process waits before it says how the run ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

from everyrank.elastic.process.sweep import SCRIBE
from everyrank.runtime.output import for_log

# Written to the standard error by the rank itself: what follows is for the log alone.
_LOG_ONLY = b"\x00\x00everyrank: for the log alone\x00\x00\n"
_PARTIAL_S = 0.1  # a line without its end (a prompt, a progress bar) is shown after so long
_CHUNK = 1 << 16


def divert_output(log_file: str, *, prefix: str, on_console: bool) -> None:
    """Send this process's standard output and error, and those of its children, through a scribe.

    Args:
        log_file: The rank's log, to which the scribe appends.
        prefix: Put before each line on the console.
        on_console: Show the lines on the console at all.
    """
    os.makedirs(os.path.dirname(log_file), exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pipes = {1: os.pipe(), 2: os.pipe()}
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    fcntl.flock(log, fcntl.LOCK_SH)
    child = os.fork()
    if child == 0:
        # Twice forked, it is nobody's child: a program that waits for its children does not find it. It leaves the
        # rank's session before the rank goes on, which may end at once, and its children are ended with it.
        os.setsid()
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:
            name.write(SCRIBE)
        if os.fork() == 0:
            _be_scribe({pipes[fd][0]: fd for fd in pipes}, log, prefix.encode(), on_console)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(log)
    for fd, (reading, writing) in pipes.items():
        os.dup2(writing, fd)
        os.close(reading)
        os.close(writing)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, write_through=True)  # what python -u does, as torchrun starts ranks


def log_only(stream: TextIO) -> None:
    """Keep what is written to a diverted standard error from here on off the console."""
    stream.flush()
    os.write(2, _LOG_ONLY)


def wait_for_logs(log_files: Iterable[str], patience_s: float = 5.0) -> None:
    """Wait until the scribes of these logs have written everything, but not longer than ``patience_s``."""
    deadline = time.monotonic() + patience_s
    for path in log_files:
        if not os.path.exists(path):
            continue
        with open(path, "rb") as log:
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    time.sleep(0.01)


def _be_scribe(sources: dict[int, int], log: int, prefix: bytes, on_console: bool) -> None:
    """Read the pipes until all their writers are gone; never returns.

    Args:
        sources: The console's descriptor by the pipe's.
        log: Descriptor of the log.
        prefix: Put before each line on the console.
        on_console: Show the lines on the console at all.
    """
    try:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
        _close_all_but({1, 2, log, *sources})
        _copy(sources, log, prefix, on_console)
    finally:
        os._exit(0)


def _copy(sources: dict[int, int], log: int, prefix: bytes, on_console: bool) -> None:
    streams = {pipe: _Stream(console if on_console else None, prefix) for pipe, console in sources.items()}
    poller = select.poll()
    for pipe in streams:
        poller.register(pipe, select.POLLIN | select.POLLHUP)
    while streams:
        waiting = any(stream.is_partial for stream in streams.values())
        ready = sorted(fd for fd, _ in poller.poll(_PARTIAL_S * 1000 if waiting else None))
        if not ready:
            for stream in streams.values():
                stream.show_partial()
        for pipe in ready:
            data = os.read(pipe, _CHUNK)
            if not data:
                poller.unregister(pipe)
                _write(log, streams[pipe].finish())
                del streams[pipe]
            else:
                _write(log, streams[pipe].take(data))


class _Stream:
    """One of a rank's two streams: whole lines at once, so that those of several ranks do not run into each other."""

    def __init__(self, console: int | None, prefix: bytes) -> None:
        self._console = console
        self._prefix = prefix
        self._unshown = b""
        self._unlogged = b""
        self._in_line = False  # the console shows the beginning of the line

    @property
    def is_partial(self) -> bool:
        """Whether the end of a line is still to come, and its beginning to be shown."""
        return bool(self._unshown)

    def take(self, data: bytes) -> bytes:
        """Show what is complete of the data; returns what belongs in the log."""
        before, quiet, after = (self._unshown + data).partition(_LOG_ONLY)
        logged = data.replace(_LOG_ONLY, b"")
        lines, newline, self._unshown = before.rpartition(b"\n")
        self._show(lines + newline)
        if quiet:
            self.show_partial()
            self._console = None
            self._unshown = after
        whole, newline, self._unlogged = (self._unlogged + logged).rpartition(b"\n")
        return _as_log(whole + newline)

    def show_partial(self) -> None:
        """Show the beginning of a line whose end is late."""
        self._show(self._unshown)
        self._unshown = b""

    def finish(self) -> bytes:
        """Show the last line, if it has no end; returns what of it belongs in the log."""
        self.show_partial()
        rest, self._unlogged = self._unlogged, b""
        return _as_log(rest)

    def _show(self, data: bytes) -> None:
        if not data or self._console is None:
            return
        if self._prefix:
            first = b"" if self._in_line else self._prefix
            # A progress bar goes back to the beginning of its line, where the prefix stands.
            text = data[:-1].replace(b"\n", b"\n" + self._prefix) + data[-1:]
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\r" + self._prefix)
            self._in_line = not data.endswith(b"\n")
            data = first + text
        for lines in _whole_writes(data):
            if not _write(self._console, lines):
                self._console = None  # closed, as by an ssh session that ended: the log goes on
                break


def _as_log(data: bytes) -> bytes:
    return for_log(data.decode("utf-8", "replace")).encode("utf-8", "replace") if data else b""


def _whole_writes(data: bytes) -> Iterator[bytes]:
    """Cut data where lines end, into pieces that a pipe takes whole: more than PIPE_BUF mixes with other writers'."""
    start = 0
    while len(data) - start > select.PIPE_BUF:
        end = data.rfind(b"\n", start, start + select.PIPE_BUF) + 1 or start + select.PIPE_BUF
        yield data[start:end]
        start = end
    yield data[start:]


def _write(fd: int, data: bytes) -> bool:
    """Write all of it; False where nobody takes it."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select([], [fd], [])
        except OSError:
            return False
    return True


def _close_all_but(kept: set[int]) -> None:
    """Close what was inherited: a pipe by which others see that the rank has ended must not stay open here."""
    last = -1
    for fd in sorted(kept):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
