"""Sprinklings into Minkowski space, against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from counted_orders import diamond_volume, is_partial_order, ordering_fraction
from five_sigma import SIGMAS, assert_mean
from hypothesis import given
from hypothesis import strategies as st

from everyrank.apps.causal_sets.constant_curvature import sprinkle
from everyrank.apps.causal_sets.estimators import expected_ordering_fraction
from everyrank.apps.causal_sets.minkowski import causal_matrix
from everyrank.apps.causal_sets.orders import link_matrix


def assert_uniform(values: np.ndarray) -> None:
    """Kolmogorov-Smirnov: sup |F_n - F| sqrt(n) exceeds 2.5 with probability 2 exp(-2 · 2.5²) = 7e-6."""
    values = np.sort(values)
    rank = np.arange(len(values))
    distance = max((values - rank / len(values)).max(), ((rank + 1) / len(values) - values).max())
    assert distance * math.sqrt(len(values)) < 2.5


def test_volume_is_that_of_two_cones() -> None:
    assert diamond_volume(2, 1.0) == pytest.approx(1 / 2)
    assert diamond_volume(3, 2.0) == pytest.approx(2 * math.pi / 3)
    assert diamond_volume(4, 2.0) == pytest.approx(2 * math.pi / 3)
    assert diamond_volume(4, 4.0) == pytest.approx(16 * diamond_volume(4, 2.0))


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_volume_agrees_with_counting_points_in_a_box(dimension: int) -> None:
    rng, half, num_points = np.random.default_rng(dimension), 0.75, 200_000
    points = rng.uniform(-half, half, (num_points, dimension))
    inside = np.linalg.norm(points[:, 1:], axis=1) + np.abs(points[:, 0]) < half
    share, box = inside.mean(), (2 * half) ** dimension
    error = box * math.sqrt(share * (1 - share) / num_points)
    assert abs(box * share - diamond_volume(dimension, 2 * half)) < SIGMAS * error


@pytest.mark.parametrize("dimension", [2, 3, 4, 5])
def test_points_are_uniform_in_the_diamond(dimension: int) -> None:
    points = sprinkle(np.random.default_rng(20 + dimension), dimension, size=20_000, a=0.0)
    time, distance = points[:, 0], np.linalg.norm(points[:, 1:], axis=1)
    margin = 1 - np.abs(time)
    assert (distance <= margin).all()
    assert (np.diff(time) >= 0).all()
    # The volume beyond a height, and within a radius, as shares of the whole: uniform if the points are.
    assert_uniform(margin**dimension)
    assert_uniform((distance / margin) ** (dimension - 1))
    assert_mean((time > 0).astype(float), 0.5)
    for axis in points[:, 1:].T:
        assert_mean(axis, 0.0)
        assert_mean((axis > 0).astype(float), 0.5)


@pytest.mark.parametrize(("dimension", "fraction"), [(2, 1 / 2), (3, 8 / 35), (4, 1 / 10)])
def test_ordering_fraction_has_the_myrheim_meyer_mean(dimension: int, fraction: float) -> None:
    assert expected_ordering_fraction(dimension) == pytest.approx(fraction)
    rng = np.random.default_rng(30 + dimension)
    assert_mean(
        [ordering_fraction(causal_matrix(sprinkle(rng, dimension, size=40, a=0.0))) for _ in range(2000)], fraction
    )


def test_mean_number_of_links_in_two_dimensions() -> None:
    """At fixed n it is (n + 1) H_n - 2 n: in light-cone coordinates the order is that of two random permutations."""
    size, rng = 30, np.random.default_rng(40)
    expected = (size + 1) * sum(1 / k for k in range(1, size + 1)) - 2 * size
    assert_mean(
        [int(link_matrix(causal_matrix(sprinkle(rng, 2, size=size, a=0.0))).sum()) for _ in range(3000)], expected
    )


@given(seed=st.integers(0, 2**32), dimension=st.integers(2, 5), size=st.integers(1, 60))
def test_causal_matrix_is_a_partial_order_sorted_by_time(seed: int, dimension: int, size: int) -> None:
    causal = causal_matrix(sprinkle(np.random.default_rng(seed), dimension, size=size, a=0.0))
    assert causal.shape == (size, size)
    assert is_partial_order(causal)
    assert not np.tril(causal).any()


def test_causal_matrix_by_hand() -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.5], [1.0, -1.9], [3.0, 0.0], [0.0, 0.0]])
    expected = np.zeros((5, 5), dtype=bool)
    expected[[0, 0, 1, 2, 4, 4], [1, 3, 3, 3, 1, 3]] = True  # the last point lies on the first: they are unrelated
    np.testing.assert_array_equal(causal_matrix(points), expected)


def test_lightlike_points_are_unrelated() -> None:
    assert not causal_matrix(np.array([[0.0, 0.0], [1.0, 1.0]])).any()


def test_same_seed_gives_the_same_points() -> None:
    draws = [sprinkle(np.random.default_rng(5), 3, size=200, a=0.0) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
