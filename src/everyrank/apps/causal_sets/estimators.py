"""Two classical estimators of a spacetime's dimension: Myrheim-Meyer and midpoint scaling.

Both are derived for flat spacetime, and take every order for one.
"""

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


def midpoint_scaling_dimension(size: ArrayLike, half_size: ArrayLike) -> NDArray[np.float64]:
    """Return the midpoint-scaling estimate, ``d = log2(N / N_half)`` (Bombelli 1987, PhD thesis, Syracuse).

    The element in the middle of an interval of proper time T splits it into two of T/2, each with 2^-d of its volume.
    The middle is the element m that makes the smaller of its two parts largest (Reid 2003, PRD 67, 024034,
    arXiv:gr-qc/0207103): ``N_half = max over m of min(past of m, future of m)``. In a sprinkled diamond all
    elements lie between the tips, so an element's parts are its whole past and future.

    Args:
        size: Numbers of elements N, of any shape.
        half_size: ``N_half``, of the same shape.

    Returns:
        Estimates of the same shape; infinity where no element has both a past and a future.
    """
    with np.errstate(divide="ignore"):
        return np.log2(np.asarray(size, dtype=np.float64) / np.asarray(half_size, dtype=np.float64))


def nearest_dimension(estimates: ArrayLike, dimensions: Sequence[int]) -> NDArray[np.int64]:
    """Return which of ``dimensions`` lies nearest to each estimate: an estimator's answer in a multiple choice."""
    choices = np.sort(np.asarray(dimensions, dtype=np.int64))
    borders = (choices[:-1] + choices[1:]) / 2
    return choices[np.searchsorted(borders, estimates)]
