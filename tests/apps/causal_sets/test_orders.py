"""What is read off an order, against counting by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from counted_orders import is_partial_order, ordering_fraction
from hypothesis import given
from hypothesis import strategies as st

from everyrank.apps.causal_sets.orders import heights, interval_sizes, link_matrix, transitive_closure


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
    assert heights(causal.T).max(initial=0) == max(height, default=0)


@pytest.mark.parametrize(
    ("name", "relations"),
    [("irreflexive", [(0, 0)]), ("antisymmetric", [(0, 1), (1, 0)]), ("transitive", [(0, 1), (1, 2)])],
)
def test_what_is_no_partial_order(name: str, relations: list[tuple[int, int]]) -> None:
    relation = np.zeros((3, 3), dtype=bool)
    relation[tuple(zip(*relations, strict=True))] = True
    assert not is_partial_order(relation), f"this is not {name}"
