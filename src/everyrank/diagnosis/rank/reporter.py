"""In a rank: a thread that says, a few times a second, how far the rank is, and on request everything the watcher asks.

It runs in any Python program, which need not know of it: ``startup/sitecustomize.py`` starts it where
``EVERYRANK_WATCH`` is set, and the ranks that we fork ourselves start it at their entry. It imports nothing that the
program has not.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any, TextIO

from everyrank.diagnosis.flight import read_recorder, to_json
from everyrank.diagnosis.frames import Place, may_wait_in_backward, stack_of, waits_for_data, waits_in_collective, where
from everyrank.diagnosis.proc import here, look_at, reads_from, stopped_processes
from everyrank.diagnosis.rank import last_words
from everyrank.diagnosis.rank.calls import note_calls, with_calls
from everyrank.diagnosis.rank.loader_workers import STACKS_SIGNAL, answer_with_samples, workers_of
from everyrank.diagnosis.rank.record import describe_error, record_error
from everyrank.diagnosis.rank_files import (
    WATCH,
    ask_for_reports,
    attempt_dir,
    beat_file,
    existing,
    fatal_file,
    is_told_to_end,
    log_file,
    newest_request,
    report_file,
    request_file,
    stacks_file,
    write_whole,
)
from everyrank.diagnosis.reports import read_beats, read_reports

_WATCHED = "EVERYRANK_WATCHED"  # pid of the process that reports as RANK: its children do not
_TICK_S = 0.2
_REPORT_EVERY_S = 10.0
_BEAT_BYTES = 4096  # the same for each, and enough for a place whose every character is escaped
_HOLD_S = 1.0  # how long a rank that lost a peer lets the others say what they do, before it ends
_LAST_S = 5.0  # how long the others live on when the guilty rank is told to end
_LEAVE_S = 10.0  # how long the end of the program waits for this thread, which may be writing to a slow disk
_MAX_STACK = 60
_NUM_LOOKS = 300  # of which it is remembered whether the rank waited for data: the latest minute

_reporter: Reporter | None = None


def start() -> None:
    """Report from this process, once, if the launch asks for it."""
    global _reporter
    watch = os.environ.get(WATCH)
    if not watch:
        return
    if _reporter is None or _reporter.pid != os.getpid():
        _reporter = Reporter(attempt_dir(watch))
        _reporter.begin()
    _reporter.claim()


def told(record: dict[str, Any]) -> None:
    """Leave the last report of a rank that an exception ends; if it only lost a peer, the others speak first."""
    if _reporter is not None and _reporter.pid == os.getpid() and _reporter.rank is not None:
        _reporter.at_error(record)


class Reporter:
    """Reports of one process.

    Args:
        folder: Folder of the attempt.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.pid = folder, os.getpid()
        self.rank: int | None = None
        self._main = threading.main_thread()
        self._here = here()
        self._beat: int | None = None
        self._files: list[TextIO] = []
        self._asked, self._seq, self._reported_seq, self._reported_s = 0, 0, -1, 0.0
        self._ended: str | None = None
        self._lock = threading.Lock()
        self._told_s = 0.0
        self._log_from = 0
        self._logs = os.path.join(os.path.dirname(os.path.dirname(folder)), "logs")
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._run, name="everyrank-reporter", daemon=True)
        self._in_data: deque[bool] = deque(maxlen=_NUM_LOOKS)

    def begin(self) -> None:
        """Start the thread, and be told of the program's end."""
        atexit.register(self.end)
        self._chain_excepthook()
        self._thread.start()

    def claim(self) -> None:
        """Report as the rank that the environment names, unless a parent of this process is that rank."""
        rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMIX_RANK") or ""
        if self.rank is None and rank.isdigit() and os.environ.get(_WATCHED) in (None, str(self.pid)):
            os.environ[_WATCHED] = str(self.pid)
            self._be(int(rank))

    def _be(self, rank: int) -> None:
        os.makedirs(self.folder, exist_ok=True)
        log = existing(log_file(self._logs, rank))
        self._log_from = os.stat(log).st_size if log else 0
        self._beat = os.open(beat_file(self.folder, rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.rank = rank  # last: the thread takes it as the word to write
        if not faulthandler.is_enabled():
            self._files.append(open(fatal_file(self.folder, rank), "w", encoding="utf-8"))  # noqa: SIM115
            faulthandler.enable(self._files[-1])
        if STACKS_SIGNAL:
            self._files.append(open(stacks_file(self.folder, rank), "a", encoding="utf-8"))  # noqa: SIM115
            answer_with_samples(self._files[-1])
        self._write_beat()
        self._report(None)  # who it is, also if it never says more

    def _run(self) -> None:
        while self.pid == os.getpid() and not self._leaves.is_set():
            # Nothing that goes wrong here may end the thread: a rank that falls silent is taken for one that hangs.
            with contextlib.suppress(Exception):
                self._tick()
            self._leaves.wait(_TICK_S)

    def _tick(self) -> None:
        c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
        joined = c10d is not None and hasattr(c10d, "is_initialized") and c10d.is_initialized()
        if c10d is not None:
            note_calls(c10d)
        if joined:
            last_words.prepare(self._say_last_words)
            if self.rank is None:  # a process that the program started itself
                self._be(int(c10d.get_rank()))
            self._seq = sum(_sequence(group) for group in list(c10d._world.pg_map))
        if self.rank is None or self._ended:
            return
        self._write_beat()
        self._end_if_told()
        asked = newest_request(self.folder)
        now_s = time.monotonic()
        if asked != self._asked or (self._seq != self._reported_seq and now_s - self._reported_s > _REPORT_EVERY_S):
            thoroughly = asked != self._asked and os.stat(request_file(self.folder)).st_size > 0
            self._asked, self._reported_seq, self._reported_s = asked, self._seq, now_s
            self._report(None, thoroughly)

    def _end_if_told(self) -> None:
        """End as a rank that the watcher kills: itself if it is the guilty one, else when that one had its time."""
        at_once = is_told_to_end(self.folder, self.rank or 0, self.pid)
        if at_once is None:
            return
        self._told_s = self._told_s or time.monotonic()
        if not at_once:
            self._end_stopped()
        if at_once or time.monotonic() - self._told_s > _LAST_S:
            os.kill(self.pid, signal.SIGKILL)

    def _end_stopped(self) -> None:
        """End the guilty rank in its place, where it is stopped and can end nothing any more."""
        stopped = stopped_processes()
        for report in read_reports(self.folder).values():
            ours = report.is_local and [report.pid, report.started] in stopped
            if ours and is_told_to_end(self.folder, report.rank, report.pid):
                os.kill(report.pid, signal.SIGKILL)

    def _stack(self) -> list[Place]:
        return stack_of(sys._current_frames().get(self._main.ident or 0))

    def _handled(self) -> Exception | None:
        """The exception that the program deals with in this moment, as in its ``except`` or ``finally`` block."""
        handled: Any = sys._current_exceptions().get(self._main.ident or 0)
        error = handled[1] if isinstance(handled, tuple) else handled
        return error if isinstance(error, Exception) else None

    def _write_beat(self) -> None:
        stack = self._stack()
        self._in_data.append(waits_for_data(stack))
        beat = {
            "time_s": round(time.time(), 3),
            "seq": self._seq,
            "pid": self.pid,
            "collective": waits_in_collective(stack),
            "where": (where(stack) or "")[-300:],
            "handled": _name(self._handled()),
        }
        assert self._beat is not None  # see _be
        os.pwrite(self._beat, json.dumps(beat).encode()[:_BEAT_BYTES].ljust(_BEAT_BYTES), 0)

    def _report(self, ended: str | None, thoroughly: bool = False, at: str | None = None) -> None:
        """Write a report of this moment; ``ended`` says how the program has ended, if it has, and ``at`` where."""
        assert self.rank is not None
        with self._lock:
            self._ended = ended
            stack = self._stack()
            collectives, groups = read_recorder()
            facts = look_at(self.pid)
            asks_workers = thoroughly and waits_for_data(stack)
            error = self._handled()
            report = {
                "rank": self.rank,
                "pid": self.pid,
                "started": facts.started if facts else 0,
                "host": os.uname().nodename,
                "here": self._here,
                "time_s": time.time(),
                "request": self._asked,
                "seq": self._seq,
                "ended": ended,
                "stack": [str(place) for place in stack[:_MAX_STACK]],
                "where": at if ended == "exit" else where(stack),
                "in_collective": waits_in_collective(stack),
                "in_backward": may_wait_in_backward(stack),
                "in_loader": waits_for_data(stack),
                "cpu_s": facts.cpu_s if facts else 0.0,
                "data_share": round(sum(self._in_data) / max(1, len(self._in_data)), 4),
                "reads": reads_from(self.pid),
                "handling": describe_error(error, self.rank, 1) if error is not None else None,
                "handled": _name(error),
                "collectives": to_json(with_calls(collectives)),
                "groups": groups,
                "workers": workers_of(self.pid, stacks_file(self.folder, self.rank)) if asks_workers else [],
                "log_from": self._log_from,
                "stopped": stopped_processes() if thoroughly else [],
            }
            with contextlib.suppress(OSError):  # a full disk: what the rank itself has to say must still be heard
                write_whole(report_file(self.folder, self.rank), json.dumps(report))

    def _say_last_words(self) -> None:
        if self.rank is not None:
            self._report("abort")
            self._let_others_speak()

    def at_error(self, record: dict[str, Any]) -> None:
        """Leave the last report of a rank that an exception ends."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._report("error")
            if record["lost_peer"]:
                self._let_others_speak()

    def _let_others_speak(self) -> None:
        """Ask the others what they do, and wait until they have said it: the launcher ends them when this rank ends."""
        asked = ask_for_reports(self.folder)
        deadline = time.monotonic() + _HOLD_S
        while time.monotonic() < deadline and self._are_silent(asked):
            time.sleep(0.02)

    def _are_silent(self, asked: int) -> bool:
        """Whether another rank has still to answer; one that is dead, stopped or stands still has not."""
        reports = read_reports(self.folder)
        for rank, beat in read_beats(self.folder).items():
            known = reports.get(rank)
            mute = known is not None and (known.is_gone or known.is_stopped or known.request >= asked)
            if rank != self.rank and beat.age_s <= _HOLD_S and not mute:
                return True
        return False

    def _chain_excepthook(self) -> None:
        before = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            record = None
            is_news = os.getpid() == self.pid and self._ended is None
            if is_news and self.rank is not None and isinstance(error, Exception):
                with contextlib.suppress(OSError):
                    os.makedirs(self._logs, exist_ok=True)
                    record = record_error(error, self.rank, 1, self._logs)
            before(kind, error, trace)
            if record is not None:
                told(record)

        sys.excepthook = hook

    def end(self, at: str | None = None) -> None:
        """Leave the last report of a rank whose program has ended; a forked one, which runs no ``atexit``, calls it."""
        last_words.forget()
        if os.getpid() != self.pid:
            return
        if self.rank is not None and self._ended is None:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._report("exit", at=at)
        # An interpreter that ends throws out a thread that asks for its lock: inside torch's C++ that is an abort.
        self._leaves.set()
        self._thread.join(_LEAVE_S)


def ended(at: str | None = None) -> None:
    """Say that this rank's program has come to its end, where no ``atexit`` will; ``at`` is the line of its exit."""
    if _reporter is not None and _reporter.pid == os.getpid():
        _reporter.end(at)


def _name(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__[:100]} {id(error)}"


def _sequence(group: Any) -> int:
    try:
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, AttributeError):  # a placeholder of a group that this rank is not in, or another backend
        return 0
