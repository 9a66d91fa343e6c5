"""The global permutation: a permutation, the same everywhere and for ever, in constant memory, and it shuffles well.

Statistical bounds lie about five standard deviations out, and seeds are fixed, so these tests do not fail by chance.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everyrank.data.permutation import GlobalPermutation
from everyrank.errors import DataError

# Epochs of orders of this many samples are looked at: few and many, powers, primes, both round counts.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 16, 25, 31, 32, 81, 100, 103, 121, 128, 1000, 1021, 4095, 4096, 4097, 10007, 65536]


def by_integers(num_samples: int, seed: int, epoch: int, position: int) -> int:
    """The sample at a position, worked out once more in Python's integers, which do not wrap around."""
    left_size = math.isqrt(num_samples - 1) + 1
    left_size += left_size % 2
    right_size = -(-num_samples // left_size)
    num_rounds = 32 if num_samples < 4096 else 8
    message = f"everyrank order 1: {num_samples} samples, seed {seed}, epoch {epoch}"
    digest = hashlib.shake_256(message.encode()).digest(16 * num_rounds)
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]

    def mixed(half: int, first: int, second: int) -> int:
        half = ((half ^ first) * 0xBF58476D1CE4E5B9) % 2**64
        half = ((half ^ (half >> 32) ^ second) * 0x94D049BB133111EB) % 2**64
        return (half ^ (half >> 29)) >> 1

    while True:
        left, right = divmod(position, right_size)
        for n in range(0, len(keys), 4):
            left = (left + mixed(right, keys[n], keys[n + 1])) % left_size
            right = (right + mixed(left, keys[n + 2], keys[n + 3])) % right_size
        position = left * right_size + right
        if position < num_samples:
            return position


@pytest.mark.parametrize("num_samples", SIZES)
def test_every_sample_stands_at_one_position(num_samples: int) -> None:
    order = GlobalPermutation(num_samples, seed=3)
    for epoch in (0, 1, 1000):
        assert np.array_equal(np.sort(order.indices(epoch, 0, num_samples)), np.arange(num_samples))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30_000), st.integers(-(2**70), 2**70), st.integers(-5, 2**40))
def test_it_is_a_bijection_for_any_size_seed_and_epoch(num_samples: int, seed: int, epoch: int) -> None:
    indices = GlobalPermutation(num_samples, seed).indices(epoch, 0, num_samples)
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(num_samples))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**64), st.integers(0, 1000), st.data())
def test_python_s_integers_and_numpy_s_agree_at_every_size(
    num_samples: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    """Python's integers do not wrap around and numpy's do; both must give the same, up to the largest size."""
    order = GlobalPermutation(num_samples, seed)
    start = data.draw(st.integers(0, num_samples - 1))
    stop = min(start + 5, num_samples)
    expected = [by_integers(num_samples, seed, epoch, position) for position in range(start, stop)]
    assert order.index(epoch, start) == expected[0]
    assert order.indices(epoch, start, stop).tolist() == expected
    assert all(0 <= index < num_samples for index in expected)
    assert len(set(expected)) == len(expected)


def test_a_range_is_its_parts() -> None:
    order = GlobalPermutation(20_011, seed=1)
    whole = order.indices(4, 0, 20_011)
    for start, stop in [(0, 0), (5, 5), (0, 1), (8191, 8193), (100, 20_011), (20_010, 20_011)]:
        assert np.array_equal(order.indices(4, start, stop), whole[start:stop])


def test_frozen_answers() -> None:
    """Checkpoints hold positions, so what stands at them must never change, on no platform and in no version."""
    assert GlobalPermutation(10, seed=0).indices(0, 0, 10).tolist() == [0, 4, 5, 9, 2, 6, 7, 1, 3, 8]
    assert GlobalPermutation(10, seed=0).indices(1, 0, 10).tolist() == [4, 0, 3, 5, 8, 2, 9, 1, 6, 7]
    assert GlobalPermutation(5000, seed=42).indices(7, 1000, 1006).tolist() == [4458, 4567, 2412, 2582, 2506, 4072]
    trillion = GlobalPermutation(10**12, seed=-1)
    assert trillion.indices(3, 10**11, 10**11 + 4).tolist() == [
        152397176720,
        208497540922,
        765997543524,
        118955538867,
    ]
    assert GlobalPermutation(2**62, seed=1).index(0, 2**62 - 1) == 1610221350298165625


def test_a_trillion_samples_cost_what_a_thousand_do() -> None:
    order = GlobalPermutation(10**12, seed=5)
    tracemalloc.start()
    samples = order.indices(0, 10**12 - 1000, 10**12)
    order.index(1, 123_456_789_012)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(set(samples.tolist())) == 1000
    assert samples.min() < 10**10 < 9 * 10**11 < samples.max()


def test_without_shuffling_it_is_the_datasets_order() -> None:
    order = GlobalPermutation(100, seed=9, shuffle=False)
    assert order.indices(3, 10, 15).tolist() == [10, 11, 12, 13, 14]
    assert order.index(8, 99) == 99


@pytest.mark.parametrize("num_samples", [0, -1, 2**62 + 1])
def test_an_impossible_size_is_refused(num_samples: int) -> None:
    with pytest.raises(DataError, match=f"num_samples={num_samples}"):
        GlobalPermutation(num_samples)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 11), (5, 4)])
def test_positions_outside_the_epoch_are_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        GlobalPermutation(10).indices(0, start, stop)
    with pytest.raises(IndexError):
        GlobalPermutation(10).index(0, 10)


def chi_square(counts: np.ndarray) -> float:
    """Return how many standard deviations the counts are from equally likely, by Wilson and Hilferty's formula."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    value = ((counts - expected) ** 2).sum() / expected
    return ((value / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize(("num_samples", "num_epochs"), [(2, 1000), (3, 2000), (4, 4000), (5, 6000)])
def test_all_permutations_of_few_samples_are_equally_likely(num_samples: int, num_epochs: int) -> None:
    order = GlobalPermutation(num_samples, seed=11)
    numbers = {permutation: i for i, permutation in enumerate(itertools.permutations(range(num_samples)))}
    counts = np.zeros(len(numbers))
    for epoch in range(num_epochs):
        counts[numbers[tuple(order.indices(epoch, 0, num_samples).tolist())]] += 1
    assert counts.min() > 0
    assert abs(chi_square(counts)) < 5


@pytest.mark.parametrize("num_samples", [9, 25, 81])
def test_odd_and_even_permutations_are_equally_likely(num_samples: int) -> None:
    """Additions modulo two odd numbers make even permutations only; here 9 = 3 x 3 and so on would be at risk."""
    order = GlobalPermutation(num_samples, seed=1)
    odd = sum(num_inversions(order.indices(epoch, 0, num_samples)) % 2 for epoch in range(1000))
    assert abs(odd - 500) < 5 * math.sqrt(250)


@pytest.mark.parametrize("num_samples", [20, 97, 5003])
def test_each_sample_is_equally_often_at_each_position(num_samples: int) -> None:
    order = GlobalPermutation(num_samples, seed=2)
    num_bins = min(num_samples, 20)
    epochs = np.stack([order.indices(epoch, 0, num_samples) for epoch in range(800)])
    for column in (0, 1, num_samples // 2, num_samples - 1):
        bins = epochs[:, column] * num_bins // num_samples
        assert abs(chi_square(np.bincount(bins, minlength=num_bins))) < 5
    # and which sample follows which: pairs of neighbours fill the square evenly
    pairs = (epochs[:, :-1] * 8 // num_samples) * 8 + epochs[:, 1:] * 8 // num_samples
    counts = np.bincount(pairs.ravel(), minlength=64) / 800
    expected = neighbour_counts(num_samples, 8)
    assert np.abs(counts - expected).max() < 5 * math.sqrt(expected.max() / 800)


@pytest.mark.parametrize("num_samples", [1000, 4096, 20_000])
def test_it_is_as_disordered_as_numpys_shuffles(num_samples: int) -> None:
    """Inversions, serial correlation, displacement and neighbours kept, in units of a random shuffle's deviation."""
    order = GlobalPermutation(num_samples, seed=8)
    identity = np.arange(num_samples)
    scores = []
    for epoch in range(24):
        indices = order.indices(epoch, 0, num_samples)
        inversions_sd = math.sqrt(num_samples * (num_samples - 1) * (2 * num_samples + 5) / 72)
        displacement_sd = math.sqrt((num_samples + 1) * (2 * num_samples**2 + 7) / 45)
        scores.append(
            [
                (num_inversions(indices) - num_samples * (num_samples - 1) / 4) / inversions_sd,
                np.corrcoef(indices[:-1], indices[1:])[0, 1] * math.sqrt(num_samples),
                np.corrcoef(indices[:-2], indices[2:])[0, 1] * math.sqrt(num_samples),
                np.corrcoef(indices, identity)[0, 1] * math.sqrt(num_samples),
                (np.abs(indices - identity).sum() - (num_samples**2 - 1) / 3) / displacement_sd,
            ]
        )
        assert (np.diff(indices) == 1).sum() < 10  # Poisson with mean 1
        assert (indices == identity).sum() < 10
    spread = np.array(scores)
    assert np.abs(spread).max() < 5
    assert np.abs(spread.mean(axis=0)).max() < 5 / math.sqrt(24)
    assert 0.5 < spread.std() < 1.5


@pytest.mark.parametrize("num_samples", [64, 10_000])
def test_epochs_and_seeds_are_unrelated(num_samples: int) -> None:
    orders = [
        GlobalPermutation(num_samples, seed).indices(epoch, 0, num_samples) for seed in range(8) for epoch in range(8)
    ]
    limit = 5.5 / math.sqrt(num_samples)
    for first, second in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(first, second)[0, 1]) < limit
        assert (first == second).sum() < 12


def test_sizes_next_to_each_other_have_unrelated_orders() -> None:
    first, second = GlobalPermutation(10_000).indices(0, 0, 10_000), GlobalPermutation(10_001).indices(0, 0, 10_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def num_inversions(indices: np.ndarray) -> int:
    """Count pairs in the wrong order: within blocks pair by pair, between them by merging sorted halves."""
    total = 0
    width = 64
    indices = indices.copy()
    for begin in range(0, len(indices), width):
        block = indices[begin : begin + width]
        total += int(np.triu(block[:, None] > block).sum())
        block.sort()
    while width < len(indices):
        for begin in range(0, len(indices) - width, 2 * width):
            left, right = indices[begin : begin + width], indices[begin + width : begin + 2 * width]
            total += int((width - np.searchsorted(left, right)).sum())
            indices[begin : begin + 2 * width] = np.sort(indices[begin : begin + 2 * width])
        width *= 2
    return total


def neighbour_counts(num_samples: int, num_bins: int) -> np.ndarray:
    """Return how many neighbours of a random permutation fall in each pair of bins, on average."""
    sizes = np.bincount(np.arange(num_samples) * num_bins // num_samples, minlength=num_bins).astype(float)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    return (pairs / num_samples).ravel()
