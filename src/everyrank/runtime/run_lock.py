"""Who writes into a run's folder: one process, as long as it lives.

The lock is a POSIX record lock (``lockf``): the kernel gives it up when the process dies, whatever kills it; a loader
process that outlives its rank does not hold it, since a fork does not inherit it; and NFS carries it to other nodes,
where a lock that only this machine knows would be none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
# Within a process such a lock is one, and closing any descriptor of its file gives it up: so each file is open once.
_held: dict[tuple[int, str], tuple[int, int]] = {}


class RunLock:
    """The right to write into a folder, shared by all who ask for it in this process.

    Args:
        folder: The run's folder, which exists.
        name: The lock's file in it. Who launches a run and who trains in it hold different ones.

    Attributes:
        holder: Who has the lock instead, in words; empty if this process has it.
    """

    def __init__(self, folder: Path, name: str = ".in-use") -> None:
        self._key = (os.getpid(), os.path.realpath(folder / name))
        self.holder = ""
        self._is_counted = False
        descriptor, count = _held.get(self._key, (-1, 0))
        if not count:
            descriptor, self.holder = _open_and_lock(folder / name)
        if not self.holder:
            _held[self._key] = (descriptor, count + 1)
            self._is_counted = True

    def release(self) -> None:
        """Give it up, if nobody else in this process holds it."""
        if not self._is_counted or self._key[0] != os.getpid():
            return
        self._is_counted = False
        descriptor, count = _held.pop(self._key)
        if count > 1:
            _held[self._key] = (descriptor, count - 1)
        elif descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Whether somebody holds this lock file. Looking does not keep others from looking."""
    if (os.getpid(), os.path.realpath(path)) in _held:
        return True  # and opening and closing the file here would give it up
    try:
        with path.open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    return False


def _open_and_lock(path: Path) -> tuple[int, str]:
    """Return the locked file, or who holds it. A file system without locks locks nothing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return descriptor, ""
        owner = os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip()
        os.close(descriptor)
        return -1, owner or "another process"
    owner = f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, owner.encode(), 0)
    return descriptor, ""
