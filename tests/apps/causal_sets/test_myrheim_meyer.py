"""The Myrheim-Meyer estimator: an inverse of its formula, right on spacetimes and fooled by layered orders."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everyrank.apps.causal_sets import kleitman_rothschild, minkowski, myrheim_meyer
from everyrank.apps.causal_sets.orders import ordering_fraction


@pytest.mark.parametrize("dimension", [2, 3, 4, 5.5, 10])
def test_formula(dimension: float) -> None:
    f_d = math.gamma(dimension + 1) * math.gamma(dimension / 2) / (4 * math.gamma(3 * dimension / 2))
    assert myrheim_meyer.expected_ordering_fraction(dimension) == pytest.approx(2 * f_d, rel=1e-12)


@given(dimension=st.floats(1.0, 40.0))
def test_estimate_inverts_the_formula(dimension: float) -> None:
    fraction = myrheim_meyer.expected_ordering_fraction(dimension)
    assert myrheim_meyer.estimate_dimension(fraction) == pytest.approx(dimension, rel=1e-9)


def test_ends_of_the_scale() -> None:
    np.testing.assert_array_equal(myrheim_meyer.estimate_dimension([0.0, 1.0]), [np.inf, 1.0])
    np.testing.assert_array_equal(myrheim_meyer.nearest_dimension([0.0, 1.0]), [4, 2])


def test_estimates_of_many_are_those_of_each() -> None:
    fractions = np.random.default_rng(0).random((3, 5))
    each = [[float(myrheim_meyer.estimate_dimension(fraction)) for fraction in row] for row in fractions]
    np.testing.assert_array_equal(myrheim_meyer.estimate_dimension(fractions), each)


def test_nearest_dimension_chooses_among_those_allowed() -> None:
    fractions = myrheim_meyer.expected_ordering_fraction([2.4, 2.6, 3.4, 3.6, 9.0])
    np.testing.assert_array_equal(myrheim_meyer.nearest_dimension(fractions), [2, 3, 3, 4, 4])
    np.testing.assert_array_equal(myrheim_meyer.nearest_dimension(fractions, (4, 2)), [2, 2, 4, 4, 4])


def test_right_on_most_sprinklings_and_fooled_by_layered_orders() -> None:
    rng = np.random.default_rng(1)
    for dimension in (2, 3, 4):
        orders = [minkowski.causal_matrix(minkowski.sprinkle(rng, dimension, size=100)) for _ in range(200)]
        answers = myrheim_meyer.nearest_dimension([ordering_fraction(order) for order in orders])
        assert (answers == dimension).mean() > 0.95
    fooled = [ordering_fraction(kleitman_rothschild.sample_order(rng, 100)) for _ in range(100)]
    estimates = myrheim_meyer.estimate_dimension(fooled)
    assert ((estimates > 2.2) & (estimates < 2.6)).all(), "a layered order passes for a spacetime of dimension 2.4"
