"""Who keeps the others waiting, a little in every step: how long each rank waited for the last to come.

A collective ends when its last rank has come. So a rank waits, in each, from its own coming (or from the end of the one
before, where it had begun several at once) to the coming of the last. No collective is measured or made slower: torch's
Flight Recorder has the times. On several hosts they are as good as the hosts' clocks agree.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from everyrank.diagnosis.flight import Key, arrivals_of
from everyrank.diagnosis.rank_files import pace_file, write_whole
from everyrank.diagnosis.reports import Report

_LEAST_COLLECTIVES = 10
_LONG, _MOST_LONG = 0.1, 6
_MOST = 0.8  # of the time that ranks wait
_MUCH = 0.2  # of the time of a rank


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The latest collectives in which all ranks took part.

    Attributes:
        num_collectives: How many.
        seconds: The time between them, without the few very long ones.
        waiting: The share of that time in which each rank waited for another, by rank.
        last: In how many of them each rank was the last to come.
        caused: The share of all waiting that was for each rank.
    """

    num_collectives: int
    seconds: float
    waiting: Mapping[int, float]
    last: Mapping[int, int]
    caused: Mapping[int, float]

    @property
    def slow(self) -> int | None:
        """The rank for which the others wait, nearly always and for much of the time, or None."""
        rank = max(self.caused, key=lambda r: self.caused[r])
        others = [share for r, share in self.waiting.items() if r != rank]
        return rank if self.caused[rank] >= _MOST and statistics.median(others) >= _MUCH else None


def pace_of(arrivals_by_rank: Mapping[int, Mapping[Key, float]]) -> Pace | None:
    """How the ranks shared the time of the latest collectives.

    Args:
        arrivals_by_rank: When each rank came to each collective, as ``arrivals_of`` gives.

    Returns:
        None for one rank, and where they have too few collectives in common.
    """
    tables = list(arrivals_by_rank.values())
    common = set.intersection(*(set(table) for table in tables)) if len(tables) > 1 else set()
    arrivals = sorted(([table[key] for table in tables] for key in common), key=max)
    intervals = _without_long_ones([_Interval.of(*pair) for pair in pairwise(arrivals)])
    if len(intervals) < _LEAST_COLLECTIVES:
        return None
    ranks = list(arrivals_by_rank)
    seconds = max(sum(interval.seconds for interval in intervals), 1e-9)
    waited = {rank: sum(interval.waited[index] for interval in intervals) for index, rank in enumerate(ranks)}
    for_rank = dict.fromkeys(ranks, 0.0)
    for interval in intervals:
        for_rank[ranks[interval.last]] += sum(interval.waited)
    last = Counter(ranks[interval.last] for interval in intervals)
    return Pace(
        num_collectives=len(intervals),
        seconds=seconds,
        waiting={rank: share / seconds for rank, share in waited.items()},
        last={rank: last[rank] for rank in ranks},
        caused={rank: share / max(sum(waited.values()), 1e-9) for rank, share in for_rank.items()},
    )


@dataclass(frozen=True)
class _Interval:
    """From the moment in which all ranks had come to one collective to that in which all had come to the next."""

    seconds: float
    waited: tuple[float, ...]
    last: int

    @classmethod
    def of(cls, before: Sequence[float], now: Sequence[float]) -> _Interval:
        free_s, come_s = max(before), max(now)
        waited = tuple(come_s - max(time_s, free_s) for time_s in now)
        return cls(come_s - free_s, waited, now.index(come_s))


def _without_long_ones(intervals: list[_Interval]) -> list[_Interval]:
    """Leave out what is no step: the start, a validation, a checkpoint are long, and few."""
    kept = sorted(intervals, key=lambda interval: interval.seconds)
    for _ in range(_MOST_LONG):
        if kept and kept[-1].seconds > _LONG * sum(interval.seconds for interval in kept):
            kept.pop()
    return kept


class Slow(NamedTuple):
    """A rank that is slow, and what is to be said of it."""

    rank: int
    said: str


def note_pace(attempt: str, reports: Mapping[int, Report]) -> Slow | None:
    """Write down how the ranks of an attempt share their time; returns the slow rank, or None.

    Args:
        attempt: Folder of the attempt.
        reports: The newest report of each rank.
    """
    pace = pace_of({rank: arrivals_of(report.collectives) for rank, report in reports.items()})
    if pace is None:
        return None
    rows = []
    for rank, report in reports.items():
        waiting = pace.waiting[rank]
        data = min(report.data_share, 1.0 - waiting)
        shares = {"data": data, "compute": 1.0 - waiting - data, "waiting": waiting}
        rows.append(
            {"rank": rank, **{name: round(share, 4) for name, share in shares.items()}, "last": pace.last[rank]}
        )
    said = None if pace.slow is None else _said(pace, pace.slow, {int(row["rank"]): row["data"] for row in rows})
    whole = {"num_collectives": pace.num_collectives, "seconds": round(pace.seconds, 3), "slow": pace.slow}
    write_whole(pace_file(attempt), json.dumps({**whole, "said": said, "ranks": rows}))
    return None if pace.slow is None or said is None else Slow(pace.slow, said)


def _said(pace: Pace, slow: int, data: Mapping[int, float]) -> str:
    others = statistics.median(share for rank, share in pace.waiting.items() if rank != slow)
    usual = statistics.median(share for rank, share in data.items() if rank != slow)
    return (
        f"rank {slow} is slow: the others waited {others:.0%} of their time, and {pace.caused[slow]:.0%} of that for "
        f"it (it was the last in {pace.last[slow]} of {pace.num_collectives} collectives); its data took "
        f"{data[slow]:.0%} of its time, the others' {usual:.0%}"
    )
