"""Calibration by hand, and of answers whose probabilities are known to be true."""

from __future__ import annotations

import numpy as np
import pytest

from everyrank.apps.causal_sets.calibration import error_of_the_calibrated, measure


def test_by_hand() -> None:
    found = measure(np.array([0.55, 0.55, 0.91, 0.95, 1.0]), np.array([True, False, True, True, False]))
    np.testing.assert_allclose(found.confidence, [0.55, 2.86 / 3])
    np.testing.assert_allclose(found.accuracy, [0.5, 2 / 3])
    assert found.count.tolist() == [2, 3]
    assert found.error == pytest.approx((2 * 0.05 + 3 * abs(2 / 3 - 2.86 / 3)) / 5)


def test_true_probabilities_show_no_more_error_than_chance() -> None:
    rng = np.random.default_rng(1)
    held = rng.uniform(0.25, 1.0, 4000)
    expected, deviation = error_of_the_calibrated(held)
    assert abs(measure(held, rng.random(4000) < held).error - expected) < 5 * deviation
    assert measure(held, rng.random(4000) < held**2).error > expected + 10 * deviation, "too sure of itself"
    assert error_of_the_calibrated(np.ones(10)) == (0.0, 0.0)
