"""Where the time of an epoch went on each rank: data, compute, and waiting for the others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from everyrank.diagnosis.flight import arrivals_of, read_recorder
from everyrank.diagnosis.judging.pace import pace_of
from everyrank.runtime.collectives import gather_objects

LEAST_S = 1.0  # of training: in a shorter epoch the gathering itself, some milliseconds, would be seen


class TimedBatches(Iterator[Any]):
    """Batches as they come, and how long they took to come.

    Attributes:
        seconds: Time in the loader so far.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self.seconds = 0.0
        self._next = batches.__next__

    def __next__(self) -> Any:
        """Wait for the next batch."""
        began_s = time.perf_counter()
        try:
            return self._next()
        finally:
            self.seconds += time.perf_counter() - began_s


def rank_seconds(seconds: float, data_s: float) -> dict[str, list[float]]:
    """Seconds of ``data``, ``compute`` and ``waiting``, each a list by rank. Collective.

    How long ranks waited is taken from their latest collectives (see ``pace_of``); where torch's Flight Recorder is
    off, there is no ``waiting``, and it is part of ``compute``.

    Args:
        seconds: How long the epoch has trained.
        data_s: How long this rank waited for its data meanwhile.
    """
    since_s = time.time() - seconds
    arrivals = {key: at_s for key, at_s in arrivals_of(read_recorder()[0]).items() if at_s >= since_s}
    found = gather_objects((seconds, data_s, arrivals))
    pace = pace_of({rank: arrivals for rank, (_, _, arrivals) in enumerate(found)})
    result: dict[str, list[float]] = {"data": [], "compute": [], "waiting": []}
    for rank, (whole_s, in_data_s, _) in enumerate(found):
        waiting_s = min(pace.waiting[rank] * whole_s, whole_s - in_data_s) if pace is not None else 0.0
        for name, value in (("data", in_data_s), ("compute", whole_s - in_data_s - waiting_s), ("waiting", waiting_s)):
            result[name].append(round(value, 3))
    if pace is None:
        del result["waiting"]
    return result
