"""A console that goes away does not end a run: a closed pipe, a full disk, descriptors that were never open."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

_STDIN, _STDOUT, _STDERR = 0, 1, 2


def outlive_console() -> None:
    """From here on, drop what this process prints and nobody can take, as the ranks do; their logs have all of it."""
    for descriptor in (_STDIN, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would get the number, and all that is printed
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    sys.stdin = sys.stdin or open(_STDIN, closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stdout = sys.__stdout__ = _forgiving(sys.stdout, _STDOUT)  # type: ignore[misc, assignment]
    sys.stderr = sys.__stderr__ = _forgiving(sys.stderr, _STDERR)  # type: ignore[misc, assignment]


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Forgiving(descriptor)),  # type: ignore[type-var]
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace" if stream is None else stream.errors,
        line_buffering=descriptor == _STDERR or os.isatty(descriptor),
    )


class _Forgiving(io.RawIOBase):
    """Writes to a descriptor, and takes what it does not."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            raise
        except OSError:
            return len(data)
