"""The estimators: Myrheim-Meyer inverts its formula, midpoint scaling its own, and both are fooled by other orders."""

from __future__ import annotations

import math

import numpy as np
import pytest
from counted_orders import ordering_fraction
from five_sigma import assert_mean
from hypothesis import given
from hypothesis import strategies as st

from everyrank.apps.causal_sets import estimators, minkowski, nonmanifold
from everyrank.apps.causal_sets.constant_curvature import sprinkle


@pytest.mark.parametrize("dimension", [2, 3, 4, 5.5, 10])
def test_formula(dimension: float) -> None:
    f_d = math.gamma(dimension + 1) * math.gamma(dimension / 2) / (4 * math.gamma(3 * dimension / 2))
    assert estimators.expected_ordering_fraction(dimension) == pytest.approx(2 * f_d, rel=1e-12)


@given(dimension=st.floats(1.0, 40.0))
def test_estimate_inverts_the_formula(dimension: float) -> None:
    fraction = estimators.expected_ordering_fraction(dimension)
    assert estimators.estimate_dimension(fraction) == pytest.approx(dimension, rel=1e-9)


def test_ends_of_the_scale() -> None:
    np.testing.assert_array_equal(estimators.estimate_dimension([0.0, 1.0]), [np.inf, 1.0])
    np.testing.assert_array_equal(estimators.midpoint_scaling_dimension([8, 8, 8], [0, 1, 2]), [np.inf, 3.0, 2.0])
    np.testing.assert_array_equal(estimators.nearest_dimension([np.inf, 1.0], (2, 3, 4)), [4, 2])


def test_estimates_of_many_are_those_of_each() -> None:
    fractions = np.random.default_rng(0).random((3, 5))
    each = [[float(estimators.estimate_dimension(fraction)) for fraction in row] for row in fractions]
    np.testing.assert_array_equal(estimators.estimate_dimension(fractions), each)


def test_nearest_dimension_chooses_among_those_allowed() -> None:
    estimates = [2.4, 2.6, 3.4, 3.6, 9.0]
    np.testing.assert_array_equal(estimators.nearest_dimension(estimates, (2, 3, 4)), [2, 3, 3, 4, 4])
    np.testing.assert_array_equal(estimators.nearest_dimension(estimates, (4, 2)), [2, 2, 4, 4, 4])


@pytest.mark.parametrize("dimension", [2, 3, 4, 5])
def test_the_middle_of_a_diamond_halves_its_duration(dimension: int) -> None:
    """So 2^-d of the elements lie before it and as many behind: what midpoint scaling rests on."""
    rng, counts = np.random.default_rng(50 + dimension), []
    for _ in range(300):
        points = sprinkle(rng, dimension, size=200, a=0.0)
        causal = minkowski.causal_matrix(np.vstack([points, np.zeros(dimension)]))
        counts += [causal[:, -1].mean() * 201 / 200, causal[-1].mean() * 201 / 200]
    assert_mean(counts, 2.0**-dimension)


def test_right_on_most_sprinklings_and_fooled_by_layered_orders() -> None:
    rng = np.random.default_rng(1)
    for dimension in (2, 3, 4):
        orders = [minkowski.causal_matrix(sprinkle(rng, dimension, size=100, a=0.0)) for _ in range(200)]
        fractions = [ordering_fraction(order) for order in orders]
        answers = estimators.nearest_dimension(estimators.estimate_dimension(fractions), (2, 3, 4))
        assert (answers == dimension).mean() > 0.95
    half_sizes = [np.minimum(order.sum(axis=0), order.sum(axis=1)).max() for order in orders]
    estimates = estimators.midpoint_scaling_dimension([100] * 200, half_sizes)
    assert 3.5 < np.median(estimates) < 5, "orders of dimension 4, of which small ones look larger"
    fooled = [ordering_fraction(nonmanifold.kleitman_rothschild(rng, 100)) for _ in range(100)]
    estimates = estimators.estimate_dimension(fooled)
    assert ((estimates > 2.2) & (estimates < 2.6)).all(), "a layered order passes for a spacetime of dimension 2.4"
