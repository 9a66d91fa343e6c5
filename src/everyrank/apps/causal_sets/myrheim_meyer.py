"""The Myrheim-Meyer estimator: a spacetime's dimension from the share of related pairs alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

MAX_DIMENSION = 64.0
"""Where the search ends: at this dimension the expected ordering fraction is below 1e-24."""


def expected_ordering_fraction(dimension: ArrayLike) -> NDArray[np.float64]:
    """Return the mean ordering fraction of a sprinkled diamond, ``r = 2 f_d``, for any real dimension d >= 1.

    ``f_d = Γ(d+1) Γ(d/2) / (4 Γ(3d/2))`` (Myrheim 1978, CERN TH.2538; Meyer 1988, PhD thesis, MIT): 1, 1/2, 8/35
    and 1/10 for d = 1, 2, 3 and 4, falling strictly with d.
    """
    d = torch.as_tensor(np.asarray(dimension, dtype=np.float64))
    log = torch.lgamma(d + 1) + torch.lgamma(d / 2) - torch.lgamma(1.5 * d)
    return (torch.exp(log) / 2).numpy()


def estimate_dimension(fraction: ArrayLike) -> NDArray[np.float64]:
    """Return the real dimension d whose expected ordering fraction is the one given.

    Args:
        fraction: Ordering fractions of any shape, each in [0, 1].

    Returns:
        Estimates of the same shape, found by bisection to a rounding error: 1 for a chain (fraction 1), and
        infinity where no element is related to another (fraction 0).
    """
    fraction = np.asarray(fraction, dtype=np.float64)
    low, high = np.full_like(fraction, 1.0), np.full_like(fraction, MAX_DIMENSION)
    for _ in range(60):
        middle = (low + high) / 2
        above = expected_ordering_fraction(middle) > fraction
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(fraction < expected_ordering_fraction(MAX_DIMENSION), np.inf, (low + high) / 2)


def nearest_dimension(fraction: ArrayLike, dimensions: Sequence[int] = (2, 3, 4)) -> NDArray[np.int64]:
    """Return which of ``dimensions`` lies nearest to the estimate; what the estimator answers in a multiple choice."""
    choices = np.sort(np.asarray(dimensions, dtype=np.int64))
    borders = (choices[:-1] + choices[1:]) / 2
    return choices[np.searchsorted(borders, estimate_dimension(fraction))]
