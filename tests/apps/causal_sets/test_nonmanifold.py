"""Orders that are like no spacetime, against what probability theory says of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from counted_orders import is_partial_order, ordering_fraction
from five_sigma import SIGMAS, assert_mean

from everyrank.apps.causal_sets import minkowski, nonmanifold
from everyrank.apps.causal_sets.constant_curvature import sprinkle
from everyrank.apps.causal_sets.orders import heights, transitive_closure
from everyrank.apps.causal_sets.samples import OTHERS, draw_other


def binomial(num: int, probability: float) -> np.ndarray:
    k = np.arange(num + 1)
    return np.array([math.comb(num, int(i)) * probability**i * (1 - probability) ** (num - i) for i in k])


def layered_fraction(sizes: list[int], probability: float) -> float:
    """The exact mean ordering fraction: follow how many elements of each next layer lie above one element."""
    relations = 0.0
    for start in range(len(sizes)):
        reached = np.zeros(2)
        reached[1] = 1.0  # one element of the layer it starts in
        for size in sizes[start + 1 :]:
            each = 1 - (1 - probability) ** np.arange(len(reached))
            reached = sum(weight * binomial(size, p) for weight, p in zip(reached, each, strict=True))
            relations += sizes[start] * float(reached @ np.arange(size + 1))
    return 2 * relations / (sum(sizes) * (sum(sizes) - 1))


def percolation_fraction(size: int, probability: float) -> float:
    """The exact mean: with k of the elements born so far above the first or itself, the next is with 1 - (1-p)^k."""
    above = np.zeros(size + 1)
    above[1] = 1.0
    relations = 0.0
    for distance in range(1, size):
        joins = 1 - (1 - probability) ** np.arange(size + 1)
        relations += (size - distance) * float(above @ joins)
        above = above * (1 - joins) + np.concatenate([[0.0], (above * joins)[:-1]])
    return 2 * relations / (size * (size - 1))


@pytest.mark.parametrize(("sizes", "probability"), [([9, 21], 0.3), ([5, 10, 5], 0.5), ([3, 4, 8, 5], 0.2)])
def test_layered_orders(sizes: list[int], probability: float) -> None:
    rng = np.random.default_rng(len(sizes))
    orders = [nonmanifold.layered(rng, sizes, probability) for _ in range(1500)]
    assert_mean([ordering_fraction(order) for order in orders], layered_fraction(sizes, probability))
    layer = np.repeat(np.arange(len(sizes)), sizes)
    for order in orders[:50]:
        assert is_partial_order(order)
        assert heights(order).max() <= len(sizes)
        lower, upper = np.nonzero(order)
        assert (layer[lower] < layer[upper]).all()
    coins = np.concatenate([order[np.ix_(layer == 0, layer == 1)].ravel() for order in orders])
    assert abs(coins.mean() - probability) < SIGMAS * math.sqrt(probability * (1 - probability) / len(coins))


@pytest.mark.parametrize("size", [2, 3, 4, 7, 40])
def test_kleitman_rothschild_orders(size: int) -> None:
    rng = np.random.default_rng(size)
    orders = [nonmanifold.kleitman_rothschild(rng, size) for _ in range(1000)]
    outer = size // 4
    sizes = [outer, size - 2 * outer, outer]
    expected = layered_fraction([num for num in sizes if num], 0.5)
    if expected:
        assert_mean([ordering_fraction(order) for order in orders], expected)
    assert all(len(order) == size and heights(order).max() <= 3 for order in orders[:50])


def test_kleitman_rothschild_ordering_fraction_tends_to_three_eighths() -> None:
    assert layered_fraction([100, 200, 100], 0.5) == pytest.approx(3 / 8, rel=0.01)


@pytest.mark.parametrize("probability", [0.03, 0.1])
def test_percolation(probability: float) -> None:
    rng = np.random.default_rng(7)
    orders = [nonmanifold.percolation(rng, 30, probability) for _ in range(1500)]
    assert_mean([ordering_fraction(order) for order in orders], percolation_fraction(30, probability))
    assert all(is_partial_order(order) for order in orders[:50])


@pytest.mark.parametrize("num_orders", [2, 3, 5])
def test_product_orders(num_orders: int) -> None:
    rng = np.random.default_rng(num_orders)
    orders = [nonmanifold.product(rng, 30, num_orders) for _ in range(1500)]
    assert_mean([ordering_fraction(order) for order in orders], 2.0 ** (1 - num_orders))
    assert all(is_partial_order(order) for order in orders[:50])


def test_a_quotient_is_the_smallest_order_that_agrees() -> None:
    """Of one pair: merge the two columns and rows and close transitively; of none: the order itself."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        causal = minkowski.causal_matrix(sprinkle(rng, 3, size=14, a=0.0))
        np.testing.assert_array_equal(nonmanifold.quotient(rng, causal, 0), causal)
        found = nonmanifold.quotient(np.random.default_rng(5), causal, 1)
        unrelated = np.argwhere(np.triu(~(causal | causal.T), k=1))
        kept, gone = unrelated[np.random.default_rng(5).integers(len(unrelated))]
        merged = causal.copy()
        merged[kept] |= merged[gone]
        merged[:, kept] |= merged[:, gone]
        merged = np.delete(np.delete(merged, gone, axis=0), gone, axis=1)
        np.testing.assert_array_equal(found, transitive_closure(merged))
        assert is_partial_order(found)
        many = nonmanifold.quotient(rng, causal, 6)
        assert is_partial_order(many)
        assert len(many) == 8
    chain = np.triu(np.ones((4, 4), dtype=bool), k=1)
    np.testing.assert_array_equal(nonmanifold.quotient(rng, chain, 2), chain)


@pytest.mark.parametrize("kind", OTHERS)
def test_each_kind_is_an_order_of_the_size_asked_for(kind: str) -> None:
    rng = np.random.default_rng(11)
    for size in (4, 5, 16, 40):
        for _ in range(20):
            order = draw_other(rng, kind, size, dimension=3)
            assert is_partial_order(order)
            is_chain = heights(order).max() == len(order)  # has no unrelated pair to identify
            assert len(order) == size or (kind == "quotient" and is_chain)
