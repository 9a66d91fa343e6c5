"""What the ranks of an attempt have reported, read from the run's folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from everyrank.diagnosis.flight import Collective
from everyrank.diagnosis.frames import (
    Place,
    is_users_place,
    may_wait_in_backward,
    waits_for_data,
    waits_in_collective,
    where,
)
from everyrank.diagnosis.proc import ProcessFacts, here, look_at
from everyrank.diagnosis.rank_files import read_json

_BEAT = re.compile(r"rank-(\d+)\.beat")
_REPORT = re.compile(r"rank-(\d+)\.report\.json")


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's sign of life.

    Attributes:
        rank: The rank.
        age_s: Seconds since it was written.
        seq: How many collectives the rank has begun, over all its groups.
        pid: Its process.
        collective: Its main thread is inside a call of torch.distributed.
        where: The user's line it was at; empty where it was at none.
        handled: A name, within its process, of the exception that it was handling; None if it was handling none.
    """

    rank: int
    age_s: float
    seq: int
    pid: int
    collective: bool
    where: str
    handled: str | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A rank's answer to a request, or its last words.

    ``process`` is what this host's kernel says of it now. A rank that has not answered the latest request ``is_late``;
    where its stack could be had all the same, by a signal, it ``is_mute``. ``log_from`` is how long its log was when it
    began. ``stopped`` are pid and start of stopped processes of its host, for a watcher that cannot look there.
    """

    rank: int
    pid: int
    started: int
    host: str
    here: str
    time_s: float
    request: int
    seq: int
    ended: str | None
    stack: tuple[str, ...]
    where: str | None
    in_collective: bool
    in_backward: bool
    in_loader: bool
    cpu_s: float
    data_share: float
    reads: str | None
    handling: Mapping[str, Any] | None
    handled: str | None
    collectives: tuple[Collective, ...]
    groups: Mapping[str, list[int]]
    workers: tuple[Mapping[str, Any], ...]
    log_from: int
    stopped: tuple[list[int], ...]
    process: ProcessFacts | None = field(default=None)
    is_late: bool = field(default=False)
    is_mute: bool = field(default=False)

    @property
    def is_local(self) -> bool:
        """Whether this host can look at, and signal, the process."""
        return _is_here(self.here, self.host)

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended."""
        return self.ended is not None or (self.is_local and (self.process is None or self.process.state == "Z"))

    @property
    def is_stopped(self) -> bool:
        """Whether the process is stopped by a signal or a debugger."""
        return self.process is not None and self.process.state in "Tt"

    @property
    def imports(self) -> bool:
        """Whether the rank is importing a module: slow on a cold or shared disk, and no fault."""
        return any("<frozen importlib._bootstrap>" in place for place in self.stack)

    @property
    def waits(self) -> bool:
        """Whether the rank is inside a collective."""
        unfinished = bool(self.collectives) and not self.collectives[-1].done
        return self.in_collective or (self.in_backward and unfinished)

    @property
    def doing(self) -> str:
        """What the rank does, in words."""
        if self.waits and self.collectives and not self.collectives[-1].done:
            last = self.collectives[-1]
            return f"waits in {last}" + (f" at {self.where}" if not last.place else "")
        if self.waits:
            return f"waits in a collective at {self.where}"
        return f"is at {self.where}"

    def with_stack(self, stack: Sequence[Place]) -> Report:
        """The report of a rank that does not answer, with the stack that its kernel's signal handler printed."""
        assert self.process is not None
        return replace(
            self,
            is_mute=True,
            time_s=time.time(),
            cpu_s=self.process.cpu_s,
            stack=tuple(str(place) for place in stack),
            where=where(stack),
            in_collective=waits_in_collective(stack),
            in_backward=may_wait_in_backward(stack),
            in_loader=waits_for_data(stack),
            reads=None,
        )

    def seen_by(self, others: Iterable[Report]) -> Report:
        """This report of a rank that does not answer, with what another rank on its host has seen of its process."""
        for other in others:
            if (other.host, other.here) == (self.host, self.here) and [self.pid, self.started] in other.stopped:
                return replace(self, is_late=False, process=ProcessFacts("T", self.cpu_s, self.started))
        return self


def _is_here(name: str, host: str) -> bool:
    return name == here() and host == os.uname().nodename  # hosts in namespaces have the same kernel


def read_beats(folder: str) -> dict[int, Beat]:
    """The signs of life of an attempt's ranks, by rank."""
    now_s = time.time()
    return {
        rank: Beat(
            rank=rank,
            age_s=max(0.0, now_s - float(row["time_s"])),
            seq=int(row["seq"]),
            pid=int(row["pid"]),
            collective=bool(row["collective"]),
            where=str(row["where"]) if is_users_place(str(row["where"])) else "",
            handled=row["handled"],
        )
        for rank, row in _rows(folder, _BEAT)
    }


def read_reports(folder: str) -> dict[int, Report]:
    """The last reports of an attempt's ranks, by rank."""
    return {rank: _report(row) for rank, row in sorted(_rows(folder, _REPORT), key=lambda found: found[0])}


def _rows(folder: str, file: re.Pattern[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = file.fullmatch(name)
        if match and (row := read_json(os.path.join(folder, name))):
            yield int(match[1]), row


def _report(row: Mapping[str, Any]) -> Report:
    values = dict(row)
    values["collectives"] = tuple(Collective(**made) for made in row["collectives"])
    for name in ("stack", "workers", "stopped"):
        values[name] = tuple(row[name])
    process = look_at(int(row["pid"])) if _is_here(row["here"], row["host"]) else None
    if process is not None and process.started != row["started"]:
        process = None  # another process has the pid now
    return Report(**values, process=process)
