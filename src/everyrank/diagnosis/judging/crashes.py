"""The judge of ranks that ended: whose end explains those of the others?"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from everyrank.diagnosis import verdict as causes
from everyrank.diagnosis.classify import OUT_OF_MEMORY, is_mismatch
from everyrank.diagnosis.frames import parse_stack, where
from everyrank.diagnosis.judging.host_signs import judge_lost, on_lost_hosts
from everyrank.diagnosis.judging.stalls import Stall, judge_departure, judge_stall
from everyrank.diagnosis.outcome import RankFailure
from everyrank.diagnosis.rank_files import fatal_file, newest_request
from everyrank.diagnosis.reports import Report, read_beats, read_reports
from everyrank.diagnosis.verdict import Verdict

_TAIL_BYTES = 16 << 10
_CLEARLY_S = 0.5  # signs of life come five times a second


def judge_crash(
    failures: Sequence[RankFailure], folder: str, *, world_size: int, attempt: int, num_oom_kills: int = 0
) -> Verdict | None:
    """Who is guilty of the end of an attempt.

    In this order: a rank's own exception, the earliest; collectives that did not fit together; a death by a signal that
    nobody of ours sent; an exit without a word; a host that is lost; a rank that left while the others were in a
    collective; a rank that stood still until the others' collective timed out. A rank that only lost its peers, or that
    we ended, is not named.

    Args:
        failures: The ranks that did not end well, as the launcher saw it.
        folder: Where the ranks of this attempt reported.
        world_size: Number of ranks; 0 if it is not known.
        attempt: Number of the attempt, from 0.
        num_oom_kills: Processes that the kernel has ended in this control group for want of memory, during the run.

    Returns:
        None if no rank failed.
    """
    if not failures:
        return None
    reports = read_reports(folder)
    case = _Case(failures, reports, folder, num_oom_kills)
    found = (
        case.own_error()
        or case.departure()
        or case.signalled()
        or case.silent_exit()
        or case.lost_host()
        or case.left_early()
        or case.terminated()
        or case.named_by_others()
        or case.stood_still(world_size)
        or Stall(rank=None, cause=causes.UNDECIDED, said="every rank that failed only lost its peers")
    )
    return case.verdict(found, attempt)


class _Case:
    """The facts of one attempt."""

    def __init__(
        self, failures: Sequence[RankFailure], reports: Mapping[int, Report], folder: str, num_oom_kills: int
    ) -> None:
        self.failures = {failure.rank: failure for failure in failures}
        self.reports, self.folder, self.num_oom_kills = reports, folder, num_oom_kills
        self.beats = read_beats(folder)
        self.errors = dict(self._errors())

    def _errors(self) -> Iterable[tuple[int, Mapping[str, Any]]]:
        """Exceptions by rank: recorded ones, and those that a rank was still cleaning up after when we ended it.

        Programs deal with exceptions that are no fault, too: one counts to the rank's last sign of life, and only if no
        rank ended by itself, this one or another.
        """
        by_others = (-signal.SIGTERM, -signal.SIGABRT)  # the latter by a library that lost its peer
        by_itself = any(failure.exit_code not in by_others for _, failure in self._silent())
        for rank, failure in self.failures.items():
            report, beat = self.reports.get(rank), self.beats.get(rank)
            if failure.error:
                yield rank, failure.error
            elif report is None or beat is None or report.ended or by_itself:
                continue
            elif report.handling and report.handled == beat.handled:
                yield rank, report.handling

    def own_error(self) -> Stall | None:
        own = [error for error in self.errors.values() if not error.get("lost_peer")]
        if not own:
            return None
        first = min(own, key=lambda error: float(error["time_s"]))
        first_line = str(first["text"]).split("\n", 1)[0]
        cause = causes.OUT_OF_MEMORY if str(first["type"]) in OUT_OF_MEMORY else causes.RAISED
        said = f"failed: {first['type']}: {first_line}"
        return Stall(rank=int(first["rank"]), cause=cause, said=said, where=first.get("where"))

    def departure(self) -> Stall | None:
        texts = [str(error["text"]) for error in self.errors.values()]
        texts += [self._log(rank) for rank, f in self.failures.items() if f.exit_code == -signal.SIGABRT]
        line = next((line for text in texts for line in text.splitlines() if is_mismatch(line)), None)
        found = judge_departure(self.reports)
        if found is None:
            return line and Stall(  # type: ignore[return-value]
                rank=None,
                cause=causes.MISMATCHED,
                said="the ranks called different collectives, and nothing tells which of them is wrong",
                evidence=(line.strip(),),
            )
        extra = (line.strip(),) if line else ()
        return replace(found, evidence=(*found.evidence, *extra))

    def signalled(self) -> Stall | None:
        for rank, failure in self._silent():
            if failure.exit_code < 0 and failure.exit_code != -signal.SIGTERM:
                return self._killed(rank, -failure.exit_code)
        return None

    def terminated(self) -> Stall | None:
        """A death by SIGTERM; but launchers end the others by it, so whoever was silent before them is the one."""
        ended = {rank: failure for rank, failure in self._silent() if failure.exit_code == -signal.SIGTERM}
        ages = sorted(((self.beats[rank].age_s if rank in self.beats else 0.0), rank) for rank in ended)
        if len(ages) > 1 and ages[-1][0] - ages[-2][0] < _CLEARLY_S:
            return None
        return self._killed(ages[-1][1], signal.SIGTERM) if ages else None

    def _silent(self) -> list[tuple[int, RankFailure]]:
        """The ranks that ended without a record, and not by us."""
        return [(r, f) for r, f in sorted(self.failures.items()) if f.error is None and not f.ended_by_us]

    def _killed(self, rank: int, signum: int) -> Stall:
        name = signal.Signals(signum).name
        if signum == signal.SIGKILL and self.num_oom_kills:
            evidence = (f"the kernel's oom_kill counter of this control group rose by {self.num_oom_kills}",)
            said = "failed: out of memory: the kernel ended it (SIGKILL)"
            return Stall(
                rank=rank, cause=causes.OUT_OF_MEMORY, said=said, where=self._last_seen(rank), evidence=evidence
            )
        hint = " (out of memory? the kernel's log, dmesg, would say so)" if name == "SIGKILL" else ""
        stack = parse_stack(_tail(fatal_file(self.folder, rank)).partition("Current thread")[2])
        return Stall(
            rank=rank,
            cause=causes.KILLED,
            said=f"failed: killed by {name}{hint}",
            where=where(stack) or self._last_seen(rank),
            evidence=(
                *(_last_lines(self._log(rank)) if name != "SIGKILL" else ()),
                *(() if where(stack) else self._moment(rank)),
            ),
        )

    def silent_exit(self) -> Stall | None:
        for rank, failure in self._silent():
            if failure.exit_code > 0:
                said = f"failed: exit code {failure.exit_code}"
                evidence = (*_last_lines(self._log(rank)), *self._moment(rank))
                return Stall(rank=rank, cause=causes.EXITED, said=said, where=self._last_seen(rank), evidence=evidence)
        return None

    def lost_host(self) -> Stall | None:
        silent = [r for rank, r in self.reports.items() if rank not in self.failures and r.ended is None]
        lost = on_lost_hosts(os.path.dirname(self.folder), silent) if self.errors else []
        return judge_lost(lost) if lost else None

    def left_early(self) -> Stall | None:
        gone = [r for rank, r in self.reports.items() if rank not in self.failures and r.is_gone]
        gone = [report for report in gone if report.ended in ("exit", None)]
        if not gone or not self.errors:
            return None
        first = min(gone, key=lambda report: report.time_s)
        said = "left early: its program ended with exit code 0 while the others were in a collective"
        if first.ended is None:
            said = "ended without a word, while the others were in a collective"
        evidence = (
            "it left no record of an exception; the others lost their connection to it",
            *self._moment(first.rank),
        )
        return Stall(
            rank=first.rank, cause=causes.LEFT_EARLY, said=said, where=self._last_seen(first.rank), evidence=evidence
        )

    def named_by_others(self) -> Stall | None:
        named = {int(error["blames"]) for error in self.errors.values() if error.get("blames") is not None}
        if len(named) != 1:
            return None
        rank = named.pop()
        error = next(e for e in self.errors.values() if e.get("blames") is not None)
        report = self.reports.get(rank)
        return Stall(
            rank=rank,
            cause=causes.SKIPPED if error["type"] == "BarrierTimeoutError" else causes.RAISED,
            said=f"is named by the others: {str(error['text']).splitlines()[0]}",
            where=self.errors.get(rank, {}).get("where") or (report.where if report else None),
        )

    def stood_still(self, world_size: int) -> Stall | None:
        """The reports are of the moment in which the first rank gave up waiting.

        A rank of another host that has not answered since may be busy, or gone with its host: nothing is known of it.
        """
        lost = {rank: r for rank, r in self.reports.items() if r.ended == "error"}
        asked = newest_request(self.folder)
        known = [r for r in self.reports.values() if r.is_local or r.request >= asked]
        alive = [r for r in known if r.rank not in lost and not r.waits]
        if not lost or len(alive) != 1 or len(self.reports) < world_size:
            return None
        waiting = {k: replace(r, in_collective=True, ended=None, here="") for k, r in lost.items()}
        return judge_stall({**self.reports, **waiting}, {}, world_size)

    def _log(self, rank: int) -> str:
        """The end of what a rank has printed; an earlier run or attempt may have used the same log."""
        report = self.reports.get(rank)
        return _tail(self.failures[rank].log_file, report.log_from if report is not None else 0)

    def _moment(self, rank: int) -> tuple[str, ...]:
        """That the line is not of the end itself, where that is so."""
        report = self.reports.get(rank)
        if (report is not None and report.ended == "exit" and report.where) or self._last_seen(rank) is None:
            return ()
        return ("the line is where it was last seen, a moment before its end",)

    def _last_seen(self, rank: int) -> str | None:
        report = self.reports.get(rank)
        if report is not None and report.ended == "exit" and report.where:
            return report.where
        beat = self.beats.get(rank)
        return beat.where or None if beat else None

    def verdict(self, found: Stall, attempt: int) -> Verdict:
        rank = found.rank
        failure = self.failures.get(rank) if rank is not None else None
        report = self.reports.get(rank) if rank is not None else None
        error = self.errors.get(rank) if rank is not None else None
        own = error if error and not error.get("lost_peer") else None
        return Verdict(
            rank=rank,
            cause=found.cause,
            said=found.said,
            host=report.host if report else None,
            pid=report.pid if report else (int(error["pid"]) if error and error.get("pid") else None),
            where=found.where,
            waiting=tuple(
                f"rank {other} ended after it: {how_it_ended(self.failures[other], self.errors.get(other))}"
                for other in sorted(self.failures)
                if other != rank
            ),
            evidence=found.evidence,
            attempt=attempt,
            traceback=str(own["traceback"]) if own else "",
            log_file=failure.log_file if failure else None,
            exit_code=failure.exit_code if failure else None,
            user_error=str(own["text"]) if own and own.get("user_error") else None,
        )


def how_it_ended(failure: RankFailure, error: Mapping[str, Any] | None) -> str:
    """The end of a rank in a few words."""
    if error:
        first_line = str(error["text"]).split("\n", 1)[0]
        return f"{error['type']}: {first_line}"
    if failure.ended_by_us:
        return "ended by the launcher"
    if failure.exit_code < 0:
        return f"killed by {signal.Signals(-failure.exit_code).name}"
    return f"exit code {failure.exit_code}"


def _tail(path: str | None, start: int = 0) -> str:
    try:
        with open(path or os.devnull, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _last_lines(text: str, number: int = 3) -> tuple[str, ...]:
    """The last words of a rank that left no other."""
    return tuple(line.rstrip()[:300] for line in text.splitlines() if line.strip())[-number:]
