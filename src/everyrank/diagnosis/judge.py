"""The end of an attempt: the one place that says who is guilty, writes it down, and returns it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from everyrank.diagnosis.judging.crashes import judge_crash
from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.diagnosis.rank_files import attempt_dir, existing, log_file, newest_attempt, watch_dir
from everyrank.diagnosis.telling import describe
from everyrank.diagnosis.verdict import Verdict, read_verdict, write_verdict


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
        The verdict, or None if no rank failed.
    """
    if not failures:
        return None
    number = newest_attempt(watch_dir(run_dir)) if attempt is None else attempt
    written = read_verdict(run_dir)
    if written is not None and written.attempt == number and written.is_stall:
        verdict = written  # the watcher ended what stood still: how the ranks then ended tells nothing
    else:
        folder = attempt_dir(watch_dir(run_dir), number)
        found = judge_crash(failures, folder, world_size=world_size, attempt=number, num_oom_kills=num_oom_kills)
        assert found is not None
        verdict = found
    if verdict.rank is not None and verdict.log_file is None:
        log = existing(log_file(os.path.join(run_dir, "logs"), verdict.rank))
        verdict = replace(verdict, log_file=log)
    if verdict.user_error is None and verdict != written:
        write_verdict(run_dir, verdict)
    return verdict


def last_block(outcome: Outcome, verdict: Verdict | None) -> str:
    """What a person reads last."""
    if verdict is None:
        return outcome.message
    return describe(verdict, outcome.world_size, outcome.num_restarts)
