"""Learning rates as pure functions of the iteration: there is no scheduler state to save or to step twice."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import Any


def learning_rate(base: float, iteration: int, train: Mapping[str, Any]) -> float:
    """Return the learning rate of an iteration.

    Args:
        base: Learning rate that the schedule begins with.
        iteration: Number of the iteration, from 1.
        train: The resolved ``train`` section.
    """
    kind = train["G_scheduler_type"]
    if kind == "MultiStepLR":
        return base * train["G_scheduler_gamma"] ** bisect.bisect_right(
            sorted(train["G_scheduler_milestones"]), iteration
        )
    if kind == "CosineAnnealingWarmRestarts":
        return _cosine(
            base,
            iteration,
            train["G_scheduler_periods"],
            train["G_scheduler_restart_weights"],
            train["G_scheduler_eta_min"],
        )
    return base


def _cosine(base: float, iteration: int, periods: list[int], weights: list[float], eta_min: float) -> float:
    """Cosine annealing with warm restarts (SGDR, arXiv 1608.03983, equation 5), each period with its own height."""
    ends = list(itertools.accumulate(periods))
    iteration = min(iteration, ends[-1])
    number = bisect.bisect_left(ends, iteration)
    begin = ends[number] - periods[number]
    weight = weights[min(number, len(weights) - 1)]
    phase = math.pi * (iteration - begin) / periods[number]
    return eta_min + weight * 0.5 * (base - eta_min) * (1 + math.cos(phase))
