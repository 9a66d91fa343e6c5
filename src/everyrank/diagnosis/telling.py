"""The verdict as a person reads it: the last lines of a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from everyrank.diagnosis import verdict as causes
from everyrank.diagnosis.judging.stalls import Stall
from everyrank.diagnosis.reports import Report
from everyrank.diagnosis.verdict import Verdict
from everyrank.errors import RankFailedError

_MAX_WAITING = 8

_FIXES = {
    causes.OUT_OF_MEMORY: "fewer samples per rank, fewer loader workers, or more memory.",
    causes.LEFT_EARLY: "every rank must take the same number of steps: look at what ends its loop, such as a shorter "
    "loader or a return in an `if`.",
    causes.STOPPED: "continue it with kill -CONT PID, or find out who stopped it.",
    causes.SKIPPED: "a collective is called by all ranks or by none: look for an `if` around one of these lines.",
    causes.MISMATCHED: "all ranks must make the same calls in the same order, with equal shapes, types and reductions; "
    "a rank with fewer batches comes to the next call too early.",
    causes.STUCK_IN_DATA: "look at the samples and the line named; a DataLoader's timeout=60 turns such a wait into an "
    "error.",
    causes.STUCK_IN_PYTHON: "look at the line named; if it is only slow, raise watch.end_after_s.",
    causes.STUCK_IN_IO: "look at the file named and its disk; if it is only slow, raise watch.end_after_s.",
    causes.LOST_HOST: "look at the host; with driver.max_restarts the run goes on when it is back.",
    causes.UNDECIDED: "compare the ranks' logs and the lines above.",
}


def describe(verdict: Verdict, world_size: int, num_restarts: int = 0) -> str:
    """What a person reads last: the guilty rank, its cause and line, the evidence, how the others stood, its log.

    Args:
        verdict: The verdict.
        world_size: Number of ranks; 0 if it is not known.
        num_restarts: How often the group had been started again.
    """
    if verdict.user_error is not None:
        lines = [f"error: {verdict.user_error}"]
        if verdict.rank is not None and world_size > 1:
            lines.append(f"  said by rank {verdict.rank} of {world_size}")
        return "\n".join([*lines, *([f"  its log: {verdict.log_file}"] if verdict.log_file else [])])
    size = f" of {world_size}" if world_size else ""
    who = "undecided:" if verdict.rank is None else f"rank {verdict.rank}{size}"
    lines = [verdict.traceback.rstrip(), ""] if verdict.traceback else []
    lines.append(f"error: {who} {verdict.said}")
    lines += [f"  {line}" for line in _details(verdict)]
    lines += [f"  {line}" for line in verdict.waiting[:_MAX_WAITING]]
    if len(verdict.waiting) > _MAX_WAITING:
        lines.append(f"  and {len(verdict.waiting) - _MAX_WAITING} more ranks")
    if num_restarts:
        lines.append(f"  the group had been started again {num_restarts} times")
    if verdict.cause in _FIXES:
        lines.append(f"  Fix: {_FIXES[verdict.cause]}")
    return "\n".join(lines)


def tell_restart(verdict: Verdict | None, attempt: int) -> None:
    """Say who failed: otherwise a run that recovers by itself would keep its trouble to itself."""
    if verdict is not None:
        who = f"rank {verdict.rank}" if verdict.rank is not None else "undecided:"
        where = f" (at {verdict.where})" if verdict.where else ""
        line = f"notice: {who} {verdict.said}{where}; all ranks start again (restart {attempt + 1})"
        print(line, file=sys.stderr, flush=True)


def _details(verdict: Verdict) -> list[str]:
    lines = []
    process = ", ".join([f"host {verdict.host}"] * bool(verdict.host) + [f"pid {verdict.pid}"] * bool(verdict.pid))
    if verdict.where:
        lines.append(f"at {verdict.where}" + (f" ({process})" if process else ""))
    elif process:
        lines.append(process)
    lines += [f"evidence: {line}" for line in verdict.evidence]
    if verdict.log_file:
        lines.append(f"its log: {verdict.log_file}")
    return lines


def notice(stall: Stall, reports: Mapping[int, Report], still_s: float) -> str:
    """One notice of a run that stands still: who waits where for whom, and what the suspect does."""
    who = f"rank {stall.rank}" if stall.rank is not None else "undecided:"
    lines = [f"notice: no rank has gone on for {still_s:.0f} s; {who} {stall.said}"]
    lines += [f"  at {stall.where}"] if stall.where else []
    lines += [f"  evidence: {line}" for line in stall.evidence]
    others = [(rank, report) for rank, report in reports.items() if rank != stall.rank]
    lines += [f"  rank {rank} {report.doing}" for rank, report in others[:_MAX_WAITING]]
    return "\n".join(lines)


def as_error(verdict: Verdict, world_size: int) -> RankFailedError:
    """The verdict as an exception."""
    return RankFailedError(
        describe(verdict, world_size),
        rank=verdict.rank,
        traceback=verdict.traceback,
        log_file=verdict.log_file,
        exit_code=verdict.exit_code if verdict.exit_code is not None else 1,
    )
