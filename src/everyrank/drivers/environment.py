"""The variables a driver sets for the ranks it starts."""

from __future__ import annotations

import os

from everyrank.drivers.driver import LaunchRequest

SUPERVISED = "EVERYRANK_SUPERVISED"


def rank_variables(request: LaunchRequest, threads_per_rank: int) -> dict[str, str]:
    """Variables for every rank: those of ``env=...``, and the number of threads unless the user's shell sets it.

    Args:
        request: The launch.
        threads_per_rank: ``OMP_NUM_THREADS``; 0 leaves it alone.
    """
    variables = dict(request.env)
    if threads_per_rank and "OMP_NUM_THREADS" not in os.environ:
        variables.setdefault("OMP_NUM_THREADS", str(threads_per_rank))
    return variables
