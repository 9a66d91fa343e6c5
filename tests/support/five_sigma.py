"""Means against theory: bounds of five standard errors, so that a true theory fails once in a million seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SIGMAS = 5


def assert_mean(values: Sequence[float] | np.ndarray, expected: float) -> None:
    """Fail where the mean of independent values is further from the expected one than chance allows."""
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert abs(np.mean(values) - expected) < SIGMAS * error, f"{np.mean(values)} ± {error}, expected {expected}"
