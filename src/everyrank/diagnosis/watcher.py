"""On the launching side: looks at the ranks once a second, says who keeps the others waiting, and ends what cannot end.

It needs only the run's folder, so it is the same for every driver. Where ranks run on other hosts, each host's own
launching process watches (``drivers/node.py``), or the ranks end themselves when they are told by a file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType

from everyrank.diagnosis.frames import parse_stack
from everyrank.diagnosis.judging.host_signs import HostSign, HostWatch, judge_lost
from everyrank.diagnosis.judging.pace import Slow, note_pace
from everyrank.diagnosis.judging.stalls import Stall, judge_departure, judge_stall
from everyrank.diagnosis.proc import look_at, oom_kills
from everyrank.diagnosis.rank.loader_workers import ask_for_stack
from everyrank.diagnosis.rank_files import (
    ask_for_reports,
    attempt_dir,
    clear_watch,
    existing,
    log_file,
    newest_attempt,
    stacks_file,
    tell_to_end,
    watch_dir,
)
from everyrank.diagnosis.reports import Beat, Report, read_beats, read_reports
from everyrank.diagnosis.telling import describe, notice
from everyrank.diagnosis.verdict import Verdict, clear_verdicts, read_verdict, write_verdict
from everyrank.diagnosis.watch_config import WatchConfig

_LOOK_EVERY_S = 0.5
_ASK_AFTER_S = 2.0  # without progress: reports are asked for, and what provably cannot end is ended
_ASK_AT_MOST_EVERY_S = 10.0
_COMPARE_EVERY_S = 10.0
_SLOW_TIMES = 3  # comparisons in a row that find the same rank slow, until it is said
_NUM_LOOKS, _LOOK_S = 20, 0.05  # for answers: looks are counted, not seconds, for a machine that slept has not looked
_OLD_S = 60.0  # in a shared folder: what was written longer ago is an earlier launch's
_ABSENT_S = 4.0  # between two looks: this process itself was stopped, or the machine slept
_MOST_A_LOOK_S = 2.0  # counts of the time since the look before: what passed while this process was not run is nobody's
_GO_ON = "notice: the ranks go on"
_SURE_AFTER_S = 1.0  # what would end a run, and was not seen so in the look before, is looked at once more


class Watcher:
    """Watches the ranks of one launch; a context manager around it.

    Args:
        run_dir: The run's folder.
        config: The ``watch`` section.
        world_size: Number of ranks; 0 if it is not known.
        say: Prints one line to a person.
        shared: Other launching processes use the folder as well: only what is old in it is cleared.
    """

    def __init__(
        self,
        run_dir: str,
        config: WatchConfig,
        world_size: int,
        say: Callable[[str], None] | None = None,
        shared: bool = False,
    ) -> None:
        self.run_dir, self.config, self.world_size = run_dir, config, world_size
        self._say = say or _print
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="everyrank-watcher", daemon=True)
        self._oom_kills = oom_kills()
        self._attempt = 0
        self._mismatch: Verdict | None = None
        self._sign = HostSign(watch_dir(run_dir)) if shared and config.enabled else None
        self._compared_s = time.monotonic()
        self._slow: tuple[int | None, int] = (None, 0)
        self._reset()
        clear_watch(watch_dir(run_dir), older_than_s=_OLD_S if shared else 0.0)
        clear_verdicts(run_dir)

    @property
    def num_oom_kills(self) -> int:
        """How many processes the kernel has ended here for want of memory since the launch."""
        return oom_kills() - self._oom_kills

    def __enter__(self) -> Watcher:
        if self._sign is not None:  # before a rank of this host can be lost with it
            with contextlib.suppress(OSError):
                self._sign.give()
        if self.config.enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._compare()
                if self._noticed and not self._ended and self._has_moved():  # between the last look and the end
                    self._say(_GO_ON)
        if self._sign is not None:
            self._sign.remove()

    def _has_moved(self) -> bool:
        return _progress(read_beats(attempt_dir(watch_dir(self.run_dir), self._attempt))) != self._progress

    def silent_mismatch(self) -> Verdict | None:
        """Ranks that took part in a collective with different things, without anybody noticing: the numbers are wrong.

        For a run that ended well; by what torch recorded of its latest collectives, and now and then before.
        """
        if self._mismatch is not None:
            write_verdict(self.run_dir, self._mismatch)
        return self._mismatch

    def _compare(self) -> None:
        attempt = newest_attempt(watch_dir(self.run_dir))
        reports = read_reports(attempt_dir(watch_dir(self.run_dir), attempt))
        self._pace(note_pace(attempt_dir(watch_dir(self.run_dir), attempt), reports))
        found = judge_departure(reports)
        if found is not None:
            verdict = stall_verdict(found, reports, 0.0, attempt)
            evidence = (*verdict.evidence, "nothing failed, but the numbers are wrong from there on")
            self._mismatch = replace(verdict, detected_after_s=None, waiting=(), evidence=evidence)

    def _pace(self, slow: Slow | None) -> None:
        """Say it, once, of a rank that stays the slow one."""
        rank = slow.rank if slow is not None else None
        self._slow = (rank, self._slow[1] + 1 if rank == self._slow[0] else 1)
        if slow is not None and self._slow[1] == _SLOW_TIMES and not self._stop.is_set():
            self._say(f"notice: {slow.said}")

    def _reset(self) -> None:
        self._progress: tuple[tuple[int, int], ...] = ()
        self._still_s = 0.0
        self._began_s = self._looked_s = time.monotonic()
        self._ask_at_s, self._pause_s = _ASK_AFTER_S, _ASK_AFTER_S
        self._noticed, self._ended = False, False
        self._suspicion: tuple[int | None, str] | None = None
        self._suspected_s = 0.0
        self._hosts = HostWatch(watch_dir(self.run_dir), self.config.lost_after_s)
        self._before: Mapping[int, Report] = {}

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_EVERY_S):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a file in the middle of a change
                if self._sign is not None:
                    self._sign.give()
                self._look()
            self._looked_s = time.monotonic()

    def _look(self) -> None:
        attempt = newest_attempt(watch_dir(self.run_dir))
        if attempt != self._attempt:
            self._attempt = attempt
            self._reset()
        folder = attempt_dir(watch_dir(self.run_dir), attempt)
        beats = read_beats(folder)
        now_s = time.monotonic()
        progress = _progress(beats)
        absent = now_s - self._looked_s > _ABSENT_S
        if progress != self._progress or absent:
            if self._noticed and not absent:
                self._say(_GO_ON)
            self._reset()
            self._progress = progress
            if self._mismatch is None and now_s - self._compared_s > _COMPARE_EVERY_S:
                self._compared_s = now_s
                self._compare_aloud(folder, beats)
            return
        self._still_s += min(now_s - self._began_s, _MOST_A_LOOK_S)
        self._began_s, still_s = now_s, self._still_s
        if self._ended or not beats or still_s < self._ask_at_s:
            return
        self._ask_at_s = still_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _ASK_AT_MOST_EVERY_S)
        for due_s in (self.config.stall_s, self.config.end_after_s):  # be there when it is time to speak, or to end
            if due_s is not None and still_s < due_s:
                self._ask_at_s = min(self._ask_at_s, due_s)
        self._judge(folder, beats, still_s)

    def _compare_aloud(self, folder: str, beats: Mapping[int, Beat]) -> None:
        self._ask(folder, beats, thoroughly=False)
        self._compare()
        if self._mismatch is not None:
            self._say(f"warning: wrong numbers:\n{describe(self._mismatch, self.world_size)}")

    def _judge(self, folder: str, beats: Mapping[int, Beat], still_s: float) -> None:
        reports = self._ask(folder, beats)
        stall = judge_stall(reports, self._before, self.world_size or len(beats))
        silent = [r for r in reports.values() if r.ended is None and (r.is_late or r.is_gone)]
        lost = self._hosts.on_lost_hosts(silent, still_s)
        if stall is not None and stall.is_seen and lost:
            stall = judge_lost(lost)
        moved = any(
            r.imports and (rank not in self._before or self._before[rank].stack != r.stack)
            for rank, r in reports.items()
        )
        self._before = self._before if self._before and still_s < self.config.stall_s and not moved else reports
        if moved:
            self._still_s = 0.0  # it imports: slow on a cold disk, and no fault
            self._ask_at_s = _ASK_AFTER_S
            return
        if stall is None or _progress(read_beats(folder)) != self._progress:
            self._suspicion = None
            return
        limit_s = self.config.end_after_s if stall.is_seen else None
        departed = stall.provable and judge_departure(reports) is not None
        is_new = self._suspicion != (stall.rank, stall.cause)
        if is_new:
            self._suspicion, self._suspected_s = (stall.rank, stall.cause), still_s
        # Who is stopped for a moment of a long phase goes on.
        sure_s = max(self.config.stall_s, self._suspected_s + self.config.stall_s / 2)
        is_over = limit_s is not None and still_s >= limit_s
        if departed or (stall.provable and still_s >= sure_s) or (is_over and not is_new):
            self._end(stall, reports, still_s)
        elif is_over:
            self._ask_at_s = still_s + _SURE_AFTER_S
        elif stall.provable:
            self._ask_at_s = min(self._ask_at_s, sure_s)
        if still_s >= self.config.stall_s and not self._noticed and not self._ended:
            self._noticed = True
            self._say(notice(stall, reports, still_s))

    def _ask(self, folder: str, beats: Mapping[int, Beat], thoroughly: bool = True) -> dict[int, Report]:
        """Fresh reports of all ranks that can give one; of a process that is stopped, the latest it gave."""
        asked = ask_for_reports(folder, thoroughly)
        for _ in range(_NUM_LOOKS):
            reports = read_reports(folder)
            late = [r for r in beats if r not in reports or (reports[r].request < asked and _can_answer(reports[r]))]
            if not late or self._stop.wait(_LOOK_S):
                break
        inside = {r: _look_inside(reports[r], folder) for r in late if r in reports and thoroughly}
        fresh = [report for report in reports.values() if report.request >= asked]
        inside = {rank: report.seen_by(fresh) if report.is_late else report for rank, report in inside.items()}
        return {r: _last_seen(report, beats.get(r)) for r, report in {**reports, **inside}.items()}

    def _end(self, stall: Stall, reports: Mapping[int, Report], still_s: float) -> None:
        """Write the verdict and end the guilty rank; its launcher then ends the others, as after any failure."""
        self._ended = True
        guilty = reports.get(stall.rank) if stall.rank is not None else None
        verdict = stall_verdict(stall, reports, still_s, self._attempt)
        if verdict.rank is not None:
            log = existing(log_file(os.path.join(self.run_dir, "logs"), verdict.rank))
            verdict = replace(verdict, log_file=log)
        written = read_verdict(self.run_dir)
        if written is None or written.attempt != self._attempt:  # else another host's watcher was the first
            write_verdict(self.run_dir, verdict)
        victims = [guilty] if guilty is not None and not guilty.is_gone else list(reports.values())
        if not all(report.is_local for report in victims):
            tell_to_end(attempt_dir(watch_dir(self.run_dir), self._attempt), stall.rank)
        for report in victims:
            process = look_at(report.pid) if report.is_local else None
            if process is not None and process.started == report.started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(report.pid, signal.SIGKILL)


def stall_verdict(stall: Stall, reports: Mapping[int, Report], still_s: float, attempt: int) -> Verdict:
    """The verdict on ranks that stand still."""
    guilty = reports.get(stall.rank) if stall.rank is not None else None
    return Verdict(
        rank=stall.rank,
        cause=stall.cause,
        said=stall.said,
        host=guilty.host if guilty else None,
        pid=guilty.pid if guilty else None,
        where=stall.where,
        waiting=tuple(f"rank {rank} {r.doing}" for rank, r in reports.items() if rank != stall.rank),
        evidence=stall.evidence,
        detected_after_s=round(still_s, 1),
        attempt=attempt,
    )


def _progress(beats: Mapping[int, Beat]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((rank, beat.seq) for rank, beat in beats.items()))


def _can_answer(report: Report) -> bool:
    return not report.is_gone and not report.is_stopped


def _last_seen(report: Report, beat: Beat | None) -> Report:
    """A rank that was stopped: its sign of life is newer than its report."""
    if beat is None or not report.is_stopped:
        return report
    return replace(report, where=beat.where or None, in_collective=beat.collective, seq=beat.seq)


def _look_inside(report: Report, folder: str) -> Report:
    """A rank that does not answer, by the stack that a signal makes it print: no thread of Python's is needed."""
    if report.is_local:
        stack = parse_stack(ask_for_stack(report.pid, stacks_file(folder, report.rank)))
        if stack:
            return report.with_stack(stack)
    return replace(report, is_late=True)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
