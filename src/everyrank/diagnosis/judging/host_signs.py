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
_NUM_LOOKS = 40  # looks are counted, not seconds: a machine that slept has not looked
_LOOK_S = 0.1


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


class HostWatch:
    """Which launching processes have given no sign of life for so long that their hosts must be lost.

    A host that is only slow, or a shared folder that shows its files late, must not be taken for one that is lost.

    Args:
        watch: The folder below which the ranks of the run report.
        lost_after_s: How long.
    """

    def __init__(self, watch: str, lost_after_s: float) -> None:
        self._watch, self._lost_after_s = watch, lost_after_s
        self._seen: dict[str, tuple[dict[str, float], float]] = {}

    def on_lost_hosts(self, reports: Iterable[Report], now_s: float) -> list[Report]:
        """Those of these ranks whose hosts have been silent; to be asked again and again, by the watcher's own clock.

        A host whose launching process has ended in good order, or has never given a sign, is not lost; nor is this one.

        Args:
            reports: Ranks of which nothing is known but what they said last.
            now_s: Seconds, by a clock that stands still while this process is not run.
        """
        suspects = _elsewhere(reports)
        signs = _signs(self._watch) if suspects else {}
        for host in signs:
            if host not in self._seen or self._seen[host][0] != signs[host]:
                self._seen[host] = (signs[host], now_s)
        silent = {host for host in signs if now_s - self._seen[host][1] >= self._lost_after_s}
        return [report for report in suspects if report.host in silent]


def _elsewhere(reports: Iterable[Report]) -> list[Report]:
    return [report for report in reports if report.host != os.uname().nodename]


def on_lost_hosts(watch: str, reports: Iterable[Report]) -> list[Report]:
    """The ranks of a failed run whose hosts give no sign of life; looks for some four seconds, as it has failed anyway.

    Args:
        watch: The folder below which the ranks of the run report.
        reports: Ranks of which nothing is known but what they said last.
    """
    suspects = _elsewhere(reports)
    before = _signs(watch) if suspects else {}
    silent = {report.host for report in suspects if report.host in before}
    for _ in range(_NUM_LOOKS):
        if not silent:
            break
        time.sleep(_LOOK_S)
        now = _signs(watch)
        silent = {host for host in silent if now.get(host) == before[host]}
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


def _signs(watch: str) -> dict[str, dict[str, float]]:
    """When each launching process gave its last sign, by host and file."""
    signs: dict[str, dict[str, float]] = {}
    for path in glob.glob(os.path.join(glob.escape(watch), "host-*.json")):
        if row := read_json(path):
            signs.setdefault(str(row["host"]), {})[path] = float(row["time_s"])
    return signs
