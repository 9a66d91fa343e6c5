"""What is read off an order, against counting by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everyrank.apps.causal_sets import kleitman_rothschild
from everyrank.apps.causal_sets.orders import (
    heights,
    interval_sizes,
    is_partial_order,
    link_matrix,
    longest_chain,
    ordering_fraction,
    transitive_closure,
)


@st.composite
def partial_orders(draw: st.DrawFn) -> np.ndarray:
    """Any order on up to 12 elements: the closure of a random acyclic relation, its elements shuffled."""
    size = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    acyclic = np.triu(rng.random((size, size)) < draw(st.floats(0, 1)), k=1)
    shuffle = rng.permutation(size)
    return transitive_closure(acyclic)[np.ix_(shuffle, shuffle)]


@given(causal=partial_orders())
def test_links_are_the_transitive_reduction(causal: np.ndarray) -> None:
    links = link_matrix(causal)
    np.testing.assert_array_equal(transitive_closure(links), causal)
    for i, j in zip(*np.nonzero(links), strict=True):
        without = links.copy()
        without[i, j] = False
        assert not transitive_closure(without)[i, j], "a link must be needed"


@given(causal=partial_orders())
def test_counts_agree_with_counting(causal: np.ndarray) -> None:
    size = len(causal)
    assert is_partial_order(causal)
    pairs = list(itertools.combinations(range(size), 2))
    related = sum(bool(causal[i, j] or causal[j, i]) for i, j in pairs)
    assert ordering_fraction(causal) == (related / len(pairs) if pairs else 0.0)
    between = interval_sizes(causal)
    for i, j in itertools.product(range(size), repeat=2):
        assert between[i, j] == sum(causal[i, k] and causal[k, j] for k in range(size))


@given(causal=partial_orders())
def test_heights_are_longest_chains(causal: np.ndarray) -> None:
    height = heights(causal)
    for j in range(len(causal)):
        assert height[j] == 1 + max((height[i] for i in np.nonzero(causal[:, j])[0]), default=0)
    assert longest_chain(causal) == max(height, default=0)
    assert longest_chain(causal.T) == longest_chain(causal)


@pytest.mark.parametrize(
    ("name", "relations"),
    [("irreflexive", [(0, 0)]), ("antisymmetric", [(0, 1), (1, 0)]), ("transitive", [(0, 1), (1, 2)])],
)
def test_what_is_no_partial_order(name: str, relations: list[tuple[int, int]]) -> None:
    relation = np.zeros((3, 3), dtype=bool)
    relation[tuple(zip(*relations, strict=True))] = True
    assert not is_partial_order(relation), f"this is not {name}"


def test_kleitman_rothschild_orders_have_three_layers() -> None:
    for size in (2, 3, 4, 7, 40, 101):
        causal = kleitman_rothschild.sample_order(np.random.default_rng(size), size)
        assert is_partial_order(causal)
        assert longest_chain(causal) <= 3
        bottom, middle, top = kleitman_rothschild.layer_sizes(size)
        assert (bottom + middle + top, bottom) == (size, top)
        layer = np.repeat([0, 1, 2], [bottom, middle, top])
        lower, upper = np.nonzero(causal)
        assert (layer[lower] < layer[upper]).all()


@pytest.mark.parametrize("size", [9, 40])
def test_kleitman_rothschild_ordering_fraction_has_its_exact_mean(size: int) -> None:
    rng = np.random.default_rng(size)
    found = [ordering_fraction(kleitman_rothschild.sample_order(rng, size)) for _ in range(3000)]
    error = np.std(found, ddof=1) / np.sqrt(len(found))
    assert abs(np.mean(found) - kleitman_rothschild.expected_ordering_fraction(size)) < 5 * error


def test_kleitman_rothschild_ordering_fraction_tends_to_three_eighths() -> None:
    for power in (2, 4, 6):
        assert abs(kleitman_rothschild.expected_ordering_fraction(4 * 10**power) - 3 / 8) < 10.0**-power


def test_adjacent_layers_are_related_by_fair_coins() -> None:
    rng, size, num_orders = np.random.default_rng(3), 40, 400
    bottom, middle, _ = kleitman_rothschild.layer_sizes(size)
    drawn = [kleitman_rothschild.sample_order(rng, size)[:bottom, bottom : bottom + middle] for _ in range(num_orders)]
    coins = np.stack(drawn).ravel()
    assert abs(coins.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(coins))
