"""The judge of ranks that stand still: who keeps the others waiting, and can it ever end?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from everyrank.diagnosis import verdict as causes
from everyrank.diagnosis.flight import Departure, find_departure
from everyrank.diagnosis.frames import is_users_place
from everyrank.diagnosis.reports import Report

_BUSY = 0.3  # of a core: a thread that computes, not one that waits


@dataclass(frozen=True, kw_only=True)
class Stall:
    """What keeps the ranks from going on.

    Attributes:
        rank: The rank all others wait for; None if nothing tells.
        cause: One of the causes in :mod:`verdict`.
        said: In plain words, after "rank 1 of 2".
        where: The user's line.
        evidence: What shows it.
        provable: It cannot end by itself.
        is_seen: A rank has just said that it waits, or was seen to. Else ranks are only silent, and may well go on.
    """

    rank: int | None
    cause: str
    said: str
    where: str | None = None
    evidence: tuple[str, ...] = ()
    provable: bool = False
    is_seen: bool = True


def judge_stall(reports: Mapping[int, Report], earlier: Mapping[int, Report], world_size: int) -> Stall | None:
    """Say who keeps the others waiting.

    Args:
        reports: The newest report of each rank.
        earlier: A report of each a while ago, to tell waiting from computing.
        world_size: Number of ranks.

    Returns:
        None if no rank waits for another.
    """
    late = [report for report in reports.values() if report.is_late]
    # What a rank said a while ago tells nothing of now: it may have gone on.
    waiting = [rank for rank, report in reports.items() if report.waits and not report.is_gone and not report.is_late]
    departure = judge_departure(reports)
    if departure is not None and (waiting or any(r.ended for r in reports.values())):
        return departure
    if not waiting:
        return replace(_late(late), is_seen=False) if any(report.waits for report in late) else None
    gone = [report for report in reports.values() if report.is_gone]
    if gone:
        first = min(gone, key=lambda report: report.time_s)
        if first.ended not in ("exit", None):
            return None  # it raised or aborted: its end is judged as a crash
        if first.ended and _has_done(first, [reports[rank] for rank in waiting]):
            return None  # the others are only slow to go on
        return _left(first)
    if len(reports) < world_size:
        return None
    if late:
        return _late(late)
    # Before what it said: that is of a moment before it was stopped.
    stopped = [report for report in reports.values() if report.is_stopped]
    if len(stopped) == 1:
        return _stopped(stopped[0])
    if stopped:
        names = ", ".join(str(report.rank) for report in stopped)
        return Stall(rank=None, cause=causes.UNDECIDED, said=f"ranks {names} are stopped")
    others = [report for rank, report in reports.items() if rank not in waiting]
    if not others:
        said = "every rank waits in the same collective: a slow or broken network, or a very large transfer"
        return Stall(rank=None, cause=causes.UNDECIDED, said=said)
    suspects = [report for report in others if report.seq == min(r.seq for r in others)]
    if len(suspects) > 1:
        names = ", ".join(str(report.rank) for report in suspects)
        said = f"ranks {names} do not come to the collective in which the others wait"
        return Stall(rank=None, cause=causes.UNDECIDED, said=said)
    return _busy(suspects[0], earlier.get(suspects[0].rank))


def judge_departure(reports: Mapping[int, Report]) -> Stall | None:
    """Ranks that took part in one collective with different things, by what torch recorded on each."""
    # Groups of one name with other members are others.
    records = {
        rank: [replace(c, group=f"{c.group} {report.groups.get(c.group)}") for c in report.collectives]
        for rank, report in reports.items()
    }
    departure = find_departure(records)
    if departure is None:
        return None
    evidence = tuple(f"rank {rank} began {c}" for rank, c in sorted(departure.by_rank.items()))
    if departure.odd is None:
        said = "the ranks called different collectives, and no earlier step tells which of them is wrong"
        return Stall(rank=None, cause=causes.MISMATCHED, said=said, evidence=evidence, provable=True)
    where = departure.by_rank[departure.odd].place
    return Stall(
        rank=departure.odd,
        cause=causes.SKIPPED if departure.skipped else causes.MISMATCHED,
        said=_departed(departure),
        where=where,
        evidence=(*evidence, f"rank {departure.odd} is the odd one: {departure.reason}"),
        provable=True,
    )


def _departed(departure: Departure) -> str:
    assert departure.odd is not None
    odd = departure.by_rank[departure.odd]
    other = next(c for rank, c in departure.by_rank.items() if c.reduced_content != odd.reduced_content)
    if departure.skipped:
        return f"left out a collective: it began {odd.op} while the others were in {other.op} {other.at}"
    if odd.op != other.op:
        return f"called another collective than the others: {odd.op}, not {other.op}"
    what, mine, theirs = "shape", odd.sizes, other.sizes
    if odd.dtypes != other.dtypes:
        what, mine, theirs = "type", odd.dtypes, other.dtypes
    elif odd.reduce != other.reduce:
        what, mine, theirs = "reduction", odd.reduce, other.reduce
    return f"called {odd.op} with another {what} than the others: {mine}, not {theirs}"


def _has_done(gone: Report, waiting: Sequence[Report]) -> bool:
    """Whether a rank that has left took its part in the collectives that the others are in."""
    pending = {(c.group, c.seq) for report in waiting for c in report.collectives[-1:] if not c.done}
    return bool(pending) and pending <= {(c.group, c.seq) for c in gone.collectives}


def _left(report: Report) -> Stall:
    said = "left early: its program came to its end while the others were in a collective"
    if report.ended is None:
        said = "is gone without a word while the others were in a collective"
    evidence = (f"its process (pid {report.pid}) has ended, and left no record of an exception",)
    return Stall(rank=report.rank, cause=causes.LEFT_EARLY, said=said, evidence=evidence, provable=True)


def _late(reports: Sequence[Report]) -> Stall:
    """What a rank said a while ago tells nothing of now: on a loaded machine it may be any of them."""
    names = ", ".join(str(report.rank) for report in reports)
    said = f"rank {names} does not answer: its host is lost or overloaded"
    return Stall(
        rank=None, cause=causes.UNDECIDED, said=said if len(reports) == 1 else said.replace("rank", "ranks", 1)
    )


def _stopped(report: Report) -> Stall:
    assert report.process is not None
    return Stall(
        rank=report.rank,
        cause=causes.STOPPED,
        said="is stopped: a signal (SIGSTOP, Ctrl-Z) or a debugger holds its process",
        where=report.where,
        evidence=(f"state {report.process.state} of pid {report.pid} in /proc",),
        provable=report.process.state == "T",  # a debugger has somebody before it, who goes on
    )


def _busy(report: Report, before: Report | None) -> Stall:
    """A rank that does something else than the others."""
    share = None
    if before is not None and report.time_s > before.time_s:
        share = (report.cpu_s - before.cpu_s) / (report.time_s - before.time_s)
    if report.in_loader:
        return _in_data(report)
    evidence: list[str] = []
    if report.is_mute:
        evidence.append("none of its threads answers: compiled code holds Python's interpreter lock")
    state = report.process.state if report.process is not None else ""
    if report.reads or state == "D":
        source = report.reads or "a device or a network disk"
        return Stall(
            rank=report.rank,
            cause=causes.STUCK_IN_IO,
            said=f"is blocked reading {source}",
            where=report.where,
            evidence=tuple(evidence),
        )
    if share is not None:
        evidence.append(f"it used {share:.0%} of a core meanwhile")
    how = (
        "computes"
        if state == "R" or (share is not None and share > _BUSY)
        else "waits"
        if share is not None
        else "is busy"
    )
    return Stall(
        rank=report.rank,
        cause=causes.STUCK_IN_PYTHON,
        said=f"{how} outside of any collective, while the others wait for it",
        where=_common_place(report.stack, before.stack if before else ()) or report.where,
        evidence=tuple(evidence),
    )


def _in_data(report: Report) -> Stall:
    evidence: list[str] = []
    where, stopped = report.where, False
    for worker in report.workers:
        held = f", holding samples {worker['samples']}" if worker["samples"] else ""
        doing = "is stopped" if worker["state"] in "Tt" else f"is at {worker['where']}" if worker["where"] else "waits"
        stopped = stopped or worker["state"] in "Tt"
        evidence.append(f"its loader worker (pid {worker['pid']}) {doing}{held}")
        where = worker["where"] if worker["samples"] and worker["where"] else where
    return Stall(
        rank=report.rank,
        cause=causes.STUCK_IN_DATA,
        said="waits for its data loader, while the others wait for it",
        where=where,
        evidence=tuple(evidence),
        provable=stopped,
    )


def _common_place(now: Sequence[str], before: Sequence[str]) -> str | None:
    """The innermost line of two stacks up to which they are equal, from the outside: the loop that does not end."""
    if not before:
        return None
    common = None
    for mine, theirs in zip(reversed(now), reversed(before), strict=False):
        if mine != theirs:
            break
        common = mine
    return common if common is not None and is_users_place(common) else None
