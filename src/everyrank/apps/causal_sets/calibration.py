"""Whether probabilities are what they say: of the answers held for 80 % likely, 80 % should be right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 10
_NUM_DRAWS = 200


@dataclass(frozen=True)
class Reliability:
    """Answers in bins of equal width of their confidence; bins without an answer are left out.

    Attributes:
        confidence: Mean confidence of each bin [num_bins].
        accuracy: Share of right answers of each bin [num_bins].
        count: Number of answers of each bin [num_bins].
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over answers of |accuracy - confidence| of their bin.

        Guo et al. 2017, "On calibration of modern neural networks", equation 3, arXiv:1706.04599.
        """
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))


def measure(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Reliability:
    """Sort answers into bins.

    Args:
        confidence: The probability [num_answers] that each answer was given; at least one.
        right: Whether it is right [num_answers].
    """
    index = np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    count = np.bincount(index, minlength=NUM_BINS)
    used = count > 0
    sums = [np.bincount(index, weights=values, minlength=NUM_BINS)[used] for values in (confidence, right)]
    return Reliability(sums[0] / count[used], sums[1] / count[used], count[used])


def error_of_the_calibrated(confidence: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean and standard deviation of the error where every confidence is true, for as many answers.

    A bin's share of right answers fluctuates, so that the expected calibration error is never 0: found by drawing
    which answers are right 200 times, from a fixed seed.
    """
    rng = np.random.default_rng(0)
    errors = [measure(confidence, rng.random(len(confidence)) < confidence).error for _ in range(_NUM_DRAWS)]
    return float(np.mean(errors)), float(np.std(errors, ddof=1))
