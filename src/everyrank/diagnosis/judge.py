"""The end of an attempt: the one place that says who is guilty, writes it down, and returns it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from everyrank.diagnosis.judging.crashes import judge_crash
from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.diagnosis.rank_files import (
    attempt_dir,
    error_file,
    existing,
    log_file,
    newest_attempt,
    read_error,
    watch_dir,
)
from everyrank.diagnosis.reports import read_reports
from everyrank.diagnosis.telling import describe
from everyrank.diagnosis.verdict import Verdict, read_verdict, write_verdict

_OTHERS_S = 3.0  # how long the launching process of another host may take to judge


def conclude(
    run_dir: str,
    failures: Sequence[RankFailure],
    *,
    world_size: int,
    attempt: int | None = None,
    num_oom_kills: int = 0,
) -> Verdict | None:
    """Judge the end of an attempt and write ``verdict.json``.

    Args:
        run_dir: The run's folder.
        failures: The ranks that did not end well, as the launcher saw it.
        world_size: Number of ranks; 0 if it is not known.
        attempt: Number of the attempt, from 0; None for the newest that has reported.
        num_oom_kills: Processes that the kernel has ended for want of memory during the run.

    Returns:
        The verdict, or None if no rank failed or was ended because it stood still.
    """
    number = newest_attempt(watch_dir(run_dir)) if attempt is None else attempt
    written = read_verdict(run_dir)
    if written is not None and written.attempt == number and written.is_stall:
        verdict = written  # the watcher ended what stood still: how the ranks then ended tells nothing, if it is known
    elif not failures:
        return None
    else:
        folder = attempt_dir(watch_dir(run_dir), number)
        known = (*failures, *_recorded_elsewhere(run_dir, folder, failures))
        found = judge_crash(known, folder, world_size=world_size, attempt=number, num_oom_kills=num_oom_kills)
        assert found is not None
        verdict = found if found.rank is not None else _of_another_host(run_dir, folder, number) or found
        written = read_verdict(run_dir)
    if verdict.rank is not None and verdict.log_file is None:
        verdict = replace(verdict, log_file=existing(log_file(os.path.join(run_dir, "logs"), verdict.rank)))
    if verdict.user_error is None and verdict != written:
        write_verdict(run_dir, verdict)
    return verdict


def _recorded_elsewhere(run_dir: str, folder: str, failures: Sequence[RankFailure]) -> Iterator[RankFailure]:
    """What ranks on other hosts have recorded of their exceptions: their launching processes judge by themselves."""
    logs = os.path.join(run_dir, "logs")
    for rank in _ranks_elsewhere(folder) - {failure.rank for failure in failures}:
        if error := read_error(error_file(logs, rank)):
            log = existing(log_file(logs, rank))
            yield RankFailure(rank=rank, exit_code=int(error["exit_code"]), error=error, log_file=log)


def _of_another_host(run_dir: str, folder: str, attempt: int) -> Verdict | None:
    """What the launching process of another host says, which knows how its ranks ended; waits for it a little."""
    deadline = time.monotonic() + (_OTHERS_S if _ranks_elsewhere(folder) else 0.0)
    while True:
        written = read_verdict(run_dir)
        if written is not None and written.attempt == attempt and written.rank is not None:
            return written
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


def _ranks_elsewhere(folder: str) -> set[int]:
    return {rank for rank, report in read_reports(folder).items() if report.host != os.uname().nodename}


def last_block(outcome: Outcome, verdict: Verdict | None) -> str:
    """What a person reads last."""
    if verdict is None:
        return outcome.message
    return describe(verdict, outcome.world_size, outcome.num_restarts)
