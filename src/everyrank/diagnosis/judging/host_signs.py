"""Signs of life of the launching processes of a run on several hosts: which host is lost?

Each launching process writes its file again and again, and removes it when it ends in good order. Clocks differ between
hosts, so only one thing tells: whether a file goes on changing while one looks at it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import time
from collections.abc import Iterable, Sequence

from everyrank.diagnosis.judging.stalls import Stall
from everyrank.diagnosis.rank_files import read_json, write_whole
from everyrank.diagnosis.reports import Report
from everyrank.diagnosis.verdict import LOST_HOST

SIGN_EVERY_S = 1.0
_PATIENCE_S = 4.0


class HostSign:
    """The sign of life of this launching process.

    Args:
        watch: The folder below which the ranks of the run report.
    """

    def __init__(self, watch: str) -> None:
        self._host, self._next_s = os.uname().nodename, 0.0
        self._path = os.path.join(watch, f"host-{self._host}-{os.getpid()}.json")

    def give(self) -> None:
        """Write it, if it is due."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + SIGN_EVERY_S
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        write_whole(self._path, json.dumps({"host": self._host, "time_s": time.time()}))

    def remove(self) -> None:
        """End in good order."""
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._path)


def on_lost_hosts(watch: str, reports: Iterable[Report]) -> list[Report]:
    """The ranks whose hosts are lost: their launching processes give no sign of life; looks for up to four seconds.

    A host whose launching process has ended in good order, or has never given a sign, is not lost; nor is this one.

    Args:
        watch: The folder below which the ranks of the run report.
        reports: Ranks of which nothing is known but what they said last.
    """
    suspects = [report for report in reports if report.host != os.uname().nodename]
    silent = _lost({report.host for report in suspects}, watch) if suspects else set()
    return [report for report in suspects if report.host in silent]


def judge_lost(lost: Sequence[Report]) -> Stall:
    """The verdict on ranks whose host is lost."""
    first = min(lost, key=lambda report: report.rank)
    others = [str(report.rank) for report in lost if report is not first]
    also = f" (also rank{'s' if len(others) > 1 else ''} {', '.join(others)})" if others else ""
    return Stall(
        rank=first.rank,
        cause=LOST_HOST,
        said=f"is lost with its host {first.host}{also}",
        where=first.where,
        evidence=(f"the launching process of {first.host} gives no sign of life any more, and neither do its ranks",),
        provable=True,
    )


def _lost(hosts: set[str], watch: str) -> set[str]:
    before = _signs(watch)
    silent = {host for host in hosts if host in before}
    deadline = time.monotonic() + _PATIENCE_S
    while silent and time.monotonic() < deadline:
        time.sleep(0.1)
        now = _signs(watch)
        silent = {host for host in silent if now.get(host) == before[host]}
    return silent


def _signs(watch: str) -> dict[str, dict[str, float]]:
    """When each launching process gave its last sign, by host and file."""
    signs: dict[str, dict[str, float]] = {}
    for path in glob.glob(os.path.join(glob.escape(watch), "host-*.json")):
        if row := read_json(path):
            signs.setdefault(str(row["host"]), {})[path] = float(row["time_s"])
    return signs
