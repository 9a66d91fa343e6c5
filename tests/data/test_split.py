"""Splits never leak."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everyrank.data.split import split_dataset, split_indices, split_sizes
from everyrank.errors import DataError


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 100))
def test_no_sample_is_in_two_parts_and_none_is_lost(num_samples: int, shares: list[int], seed: int) -> None:
    if not sum(shares):
        return
    fractions = [share / sum(shares) for share in shares]
    parts = split_indices(num_samples, fractions, seed)
    together = np.concatenate(parts)
    assert np.array_equal(np.sort(together), np.arange(num_samples))
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * num_samples) < 1
        assert (np.diff(part) > 0).all()
    again = split_indices(num_samples, fractions, seed)
    assert all(np.array_equal(first, second) for first, second in zip(parts, again, strict=True))


def test_sizes_are_exact() -> None:
    assert split_sizes(103, [0.8, 0.1, 0.1]) == [83, 10, 10]
    assert split_sizes(10, [0.8, 0.1, 0.1]) == [8, 1, 1]
    assert split_sizes(5, [0.8, 0.1, 0.1]) == [4, 1, 0]
    assert split_sizes(3, [1 / 3, 1 / 3, 1 / 3]) == [1, 1, 1]
    assert split_sizes(7, [1.0]) == [7]


def test_a_split_is_frozen_and_changes_with_the_seed() -> None:
    """A resumed or evaluated run must find the same test samples, in every version."""
    assert [part.tolist() for part in split_indices(12, [0.5, 0.25, 0.25], seed=3)] == [
        [1, 3, 4, 6, 7, 11],
        [5, 8, 10],
        [0, 2, 9],
    ]
    assert not np.array_equal(split_indices(100, [0.5, 0.5], 0)[0], split_indices(100, [0.5, 0.5], 1)[0])


def test_views_show_their_samples() -> None:
    data = [f"sample {i}" for i in range(20)]
    parts = split_dataset(data, [0.7, 0.3], seed=1)
    assert [len(part) for part in parts] == [14, 6]
    assert sorted(part[i] for part in parts for i in range(len(part))) == sorted(data)
    assert parts[0].__getitems__([3, 0]) == [parts[0][3], parts[0][0]]


@pytest.mark.parametrize("fractions", [[], [0.5], [0.5, 0.6], [1.5, -0.5], [0.8, 0.1]])
def test_fractions_that_do_not_make_one_are_refused(fractions: list[float]) -> None:
    with pytest.raises(DataError, match="fractions"):
        split_indices(10, fractions)
