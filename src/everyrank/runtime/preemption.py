"""Signals that ask a run to stop: noticed on any rank, agreed on by all ranks in the same step."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from everyrank.errors import EXIT_INTERRUPTED
from everyrank.runtime.logs import get_logger

_WATCHED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_AT_ONCE = (signal.SIGTERM, signal.SIGINT)
# A signal to a process group reaches a rank directly and once more through its launcher: the two count as one.
_SAME_WISH_S = 2.0


class PreemptionWatch:
    """Notice SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C, and let all ranks agree on when to stop.

    As a context manager it installs handlers that only take note, and puts the former ones back at the end. The second
    SIGTERM, or the second Ctrl-C, ends this process at once (also while it is blocked inside a collective), with exit
    code 143 or 130. One that follows the first within two seconds counts as the same request, since launchers pass on a
    signal that the process group has received already; a third ends the process in any case.

    :meth:`agreed` costs a reduction of one integer that runs in the background on a group of its own and is read one
    call later: no wait in the usual case, no host-device sync, nothing at world size 1.

    Every rank must make the watch, call ``agreed`` and leave the block the same number of times. Outside of the main
    thread, where Python allows no handlers, a watch notices nothing itself but agrees with the other ranks.

    Example:
        ::

            with PreemptionWatch() as watch:
                for batch in loader:
                    train(batch)
                    if signal_name := watch.agreed():
                        save_checkpoint()
                        raise Preempted(signal_name)
    """

    def __init__(self) -> None:
        self._noticed = 0
        self._group: dist.ProcessGroup | None = None
        self._flag: torch.Tensor | None = None
        self._work: Any = None
        self._verdict: str | None = None
        self._previous: dict[int, Any] = {}
        self._previous_wakeup_fd = -1
        self._read_end: socket.socket | None = None
        self._write_end: socket.socket | None = None
        self._listener: threading.Thread | None = None
        self._arrivals_s: dict[int, list[float]] = {}

    def __enter__(self) -> PreemptionWatch:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._uninstall()
        if kind is None and self._group is not None:
            # All ranks are here: what runs in the background ends. After an exception this rank may be alone, and the
            # group ends with the process's default group.
            if self._work is not None:
                self._work.wait()
            dist.destroy_process_group(self._group)
        self._work = self._group = None

    @property
    def noticed(self) -> str | None:
        """Name of the signal this process has got, or None. The other ranks do not know it yet."""
        return signal.Signals(self._noticed).name if self._noticed else None

    def agreed(self) -> str | None:
        """Return the name of the signal that any rank has got, or None: the same answer on all ranks. Collective.

        A signal shows up in the next call but one at the latest. Once there is an answer it stays.
        """
        if self._verdict is not None:
            return self._verdict
        if self._group is None:
            self._verdict = self.noticed
            return self._verdict
        found = 0
        if self._work is not None:
            self._work.wait()
            assert self._flag is not None
            found = int(self._flag)
            self._work = None
        if found:
            self._verdict = signal.Signals(found).name
            return self._verdict
        self._flag = torch.tensor(self._noticed, dtype=torch.int32)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return None

    def _install(self) -> None:
        """Install the handlers, and a thread that learns of signals even while the main thread is in C code.

        Python runs handlers in the main thread between bytecodes; a rank that waits in a collective gets to none. The
        C-level handler writes each signal's number into the wakeup descriptor, from which the thread reads.
        """
        self._read_end, self._write_end = socket.socketpair()
        self._write_end.setblocking(False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="everyrank-signals", daemon=True)
        self._listener.start()
        for number in _WATCHED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it, on purpose
                self._previous[number] = signal.signal(number, self._take_note)

    def _uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()
        if self._write_end is None or self._read_end is None:
            return
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        # Shut down and not only closed: loader processes forked meanwhile hold copies, and the listener must end.
        self._write_end.shutdown(socket.SHUT_RDWR)
        self._write_end.close()
        if self._listener is not None:
            self._listener.join()
        self._read_end.close()
        self._read_end = self._write_end = self._listener = None

    def _take_note(self, signum: int, frame: FrameType | None) -> None:
        """Take note at once. Counting is the listener's: after a long stay in C code this runs late."""
        self._noticed = self._noticed or signum

    def _listen(self) -> None:
        assert self._read_end is not None
        while numbers := self._read_end.recv(64):
            for number in numbers:
                self._note(number)

    def _note(self, number: int) -> None:
        if number not in _WATCHED:  # any signal with a Python handler is told here: a real-time one has no name at all
            return
        name = signal.Signals(number).name
        arrivals_s = self._arrivals_s.setdefault(number, [])
        arrivals_s.append(time.monotonic())
        self._noticed = self._noticed or number
        if number in _AT_ONCE and (len(arrivals_s) > 2 or arrivals_s[-1] - arrivals_s[0] > _SAME_WISH_S):
            code = EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number
            os.write(2, f"everyrank: {name} again: ending at once\n".encode())
            os._exit(code)
        if len(arrivals_s) == 1:
            get_logger("runtime").warning("got %s: all ranks will stop at the same step (again: at once)", name)
