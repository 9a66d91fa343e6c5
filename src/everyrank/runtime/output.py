"""Everything a rank prints, on the console and in its log file."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_STDOUT, _STDERR = 1, 2
_TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # ECMA-48 control sequences: colours, cursor moves


@contextmanager
def tee_output(log_file: str | Path) -> Iterator[None]:
    """Send this process's output to ``log_file`` as well, for the length of the block.

    What Python writes to ``sys.stdout`` and ``sys.stderr`` goes to the console and, without colours and overwritten
    states of progress bars, to the file. ``sys.__stdout__`` and ``sys.__stderr__`` are the console alone meanwhile: the
    place for a live display.
    What others write to the descriptors 1 and 2 (the C++ library that aborts, the kernel-side message of a GPU assert,
    the interpreter's own fatal error, child processes) goes straight to the file and not to the console: the launching
    side shows the end of a failed rank's log.

    Why so: a thread or a child that reads a pipe would copy such messages to both places, but a thread dies with
    its process, before it has copied the very line that says why, and a child may write after the launcher has read the
    log. Here every line is in the file when the process is gone, be it by SIGABRT or SIGKILL.

    Use it outermost, before anything keeps a reference to ``sys.stdout`` or ``sys.stderr``. The file is appended to, so
    that a restarted rank goes on in the same file.

    Args:
        log_file: The rank's log; its folder is made.
    """
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    log_fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    outer = {_STDOUT: sys.stdout, _STDERR: sys.stderr}
    original = sys.__stdout__, sys.__stderr__
    for stream in outer.values():
        with suppress(OSError, ValueError):  # a console that is closed has nothing left to flush
            stream.flush()
    saved = {fd: os.dup(fd) for fd in outer}
    lock = threading.RLock()
    tees = {fd: _Tee(outer[fd], saved[fd], fd, log_fd, lock, Path(log_file).resolve()) for fd in outer}
    try:
        for fd in outer:
            os.dup2(log_fd, fd)
        sys.stdout, sys.stderr = tees[_STDOUT], tees[_STDERR]
        sys.__stdout__, sys.__stderr__ = tees[_STDOUT].console, tees[_STDERR].console  # type: ignore[misc, assignment]
        yield
    finally:
        sys.__stdout__, sys.__stderr__ = original  # type: ignore[misc]
        for fd, tee in tees.items():
            tee.finish()
            os.dup2(saved[fd], fd)
        # Somebody may have replaced the streams meanwhile (a test's capture): what is not ours is left alone.
        sys.stdout = outer[_STDOUT] if sys.stdout is tees[_STDOUT] else sys.stdout
        sys.stderr = outer[_STDERR] if sys.stderr is tees[_STDERR] else sys.stderr
        for fd in (*saved.values(), log_fd):
            os.close(fd)


def for_log(text: str) -> str:
    """Text without colours, and with the last state only of lines that redraw themselves, as progress bars do."""
    lines = _TERMINAL_CODES.sub("", text).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


class _Tee(io.TextIOBase):
    """A text stream that writes to the console and to the log; it looks like the console to whoever asks."""

    def __init__(
        self, outer: TextIO, console_fd: int, fd: int, log_fd: int, lock: threading.RLock, log_file: Path
    ) -> None:
        self.log_file = log_file
        self._outer = outer
        self._log_fd = log_fd
        self._lock = lock
        self._pending = ""
        self._finished = False
        # A stream over the descriptor itself (not a capture or a notebook's stream) must not use it while it is the log
        self._own = _descriptor(outer) == fd
        self.console: TextIO = (
            io.TextIOWrapper(
                os.fdopen(os.dup(console_fd), "wb"),
                encoding=outer.encoding,
                errors=outer.errors,
                line_buffering=getattr(outer, "line_buffering", True),
                write_through=getattr(outer, "write_through", False),
            )
            if self._own
            else outer
        )
        self.buffer = _TeeBytes(self)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._outer.encoding or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._outer.errors

    def isatty(self) -> bool:
        return self.console.isatty()  # the outer stream's own descriptor is the log file now

    def fileno(self) -> int:
        return self.console.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            if self._finished:
                return self._outer.write(text)
            with suppress(OSError):  # a console that went away (a closed ssh session) must not end the training
                self.console.write(text)
            lines, newline, rest = (self._pending + text).rpartition("\n")
            # Only a line that redraws itself waits for its end: nothing else may be lost if the process is killed
            self._pending = rest if "\r" in rest else ""
            self._to_log(lines + newline + ("" if self._pending else rest))
        return len(text)

    def flush(self) -> None:
        if self._finished:
            self._outer.flush()
            return
        with suppress(OSError):
            self.console.flush()

    def finish(self) -> None:
        """Write the unfinished last line, and from now on to the outer stream."""
        with self._lock:
            if self._pending:
                self._to_log(self._pending)
                self._pending = ""
            self.flush()
            self._finished = True
            if self._own:
                with suppress(OSError):
                    self.console.close()

    def _to_log(self, text: str) -> None:
        data = for_log(text).encode("utf-8", "backslashreplace")
        with suppress(OSError):  # a full disk must not end the training, and there is nowhere else to say it
            while data:
                data = data[os.write(self._log_fd, data) :]


class _TeeBytes(io.RawIOBase):
    """The binary side of a tee, for programs that write to ``sys.stdout.buffer``."""

    def __init__(self, tee: _Tee) -> None:
        self._tee = tee

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._tee.write(bytes(data).decode(self._tee.encoding, "replace"))
        return len(data)

    def flush(self) -> None:
        self._tee.flush()


def _descriptor(stream: TextIO) -> int:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return -1
