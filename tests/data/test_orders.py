"""Weighted, mixed and block-wise orders: right proportions, nothing lost, one position and a range agree."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everyrank.data.order import GlobalOrder, Order
from everyrank.data.orders import BlockOrder, ConcatenatedDataset, MixtureOrder, WeightedOrder
from everyrank.data.per_sample import GlobalSampler
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import DataError

ORDERS = {
    "weighted": lambda seed=0: WeightedOrder(np.arange(200.0), 5000, seed=seed),
    "mixture": lambda seed=0: MixtureOrder([700, 30, 5], [0.7, 0.2, 0.1], 3000, seed=seed),
    "block": lambda seed=0: BlockOrder(3003, 10, 7, seed=seed),
}


@pytest.mark.parametrize("name", ORDERS)
def test_one_position_a_range_and_all_ranks_agree(name: str) -> None:
    order: Order = ORDERS[name]()
    whole = order.indices(2, 0, order.num_samples)
    assert whole.dtype == np.int64
    rng = np.random.default_rng(0)
    for start in rng.integers(0, order.num_samples, 25).tolist():
        stop = min(start + int(rng.integers(0, 1500)), order.num_samples)
        assert np.array_equal(order.indices(2, start, stop), whole[start:stop])
        assert order.index(2, start) == whole[start]
    assert not np.array_equal(order.indices(3, 0, 500), whole[:500])
    assert not np.array_equal(ORDERS[name](1).indices(2, 0, 500), whole[:500])
    options = {"global_batch_size": 100, "order": order}
    alone = GlobalBatchSampler(order.num_samples, **options)
    ranks = [GlobalBatchSampler(order.num_samples, rank=rank, world_size=3, **options) for rank in range(3)]
    together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert [sorted(batch) for batch in together][:-1] == [sorted(batch) for batch in alone][:-1]


@pytest.mark.parametrize("name", ORDERS)
def test_a_checkpoint_of_another_order_is_refused(name: str) -> None:
    def sampler(order: Order) -> GlobalBatchSampler:
        return GlobalBatchSampler(order.num_samples, global_batch_size=10, order=order)

    state = json.loads(json.dumps(sampler(ORDERS[name]()).state_dict()))
    sampler(ORDERS[name]()).load_state_dict(state)
    with pytest.raises(DataError, match="order"):
        sampler(ORDERS[name](1)).load_state_dict(state)


def test_weights_are_kept_and_zero_is_never_drawn() -> None:
    weights = np.array([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    drawn = WeightedOrder(weights, 80_000, seed=1).indices(0, 0, 80_000)
    counts = np.bincount(drawn, minlength=6)
    assert counts[weights == 0].sum() == 0
    expected = weights / weights.sum() * 80_000
    used = weights > 0
    chi_square = ((counts[used] - expected[used]) ** 2 / expected[used]).sum()
    assert chi_square < 30  # two degrees of freedom
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / np.sqrt(80_000)
    assert WeightedOrder(weights, 3).indices(0, 0, 3).tolist() == [2, 4, 2]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [[1.0]]])
def test_impossible_weights_are_refused(weights: list) -> None:
    with pytest.raises(DataError, match="weights"):
        WeightedOrder(weights)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0.1, 0.5, 1, 2, 3.5, 1 / 3])), min_size=1, max_size=4),
    st.integers(1, 2500),
)
def test_each_dataset_of_a_mixture_keeps_its_ratio_and_its_own_epochs(parts: list, num_samples: int) -> None:
    sizes, ratios = [size for size, _ in parts], [ratio for _, ratio in parts]
    order = MixtureOrder(sizes, ratios, num_samples, seed=3)
    stream = np.concatenate([order.indices(epoch, 0, num_samples) for epoch in range(3)])
    assert stream.min() >= 0
    assert stream.max() < sum(sizes)
    for size, ratio, offset in zip(sizes, ratios, itertools.accumulate([0, *sizes]), strict=False):
        mine = stream[(stream >= offset) & (stream < offset + size)] - offset
        assert abs(len(mine) - len(stream) * ratio / sum(ratios)) <= 520 * (len(parts) > 1) + 1  # the last, cut block
        counts = np.bincount(mine, minlength=size)
        # its passes follow each other, so no sample is ever more than a block's worth ahead of another
        assert counts.max() - counts.min() <= 1 + -(-1024 // size)


def test_a_mixture_is_exact_in_every_block() -> None:
    order = MixtureOrder([1000, 1000], [3, 1], 4096)
    kinds = order.indices(0, 0, 4096) >= 1000
    assert [int(block.sum()) for block in np.split(kinds, 4)] == [256] * 4
    first_pass = order.indices(0, 0, 4096)[~kinds][:768]
    assert len(set(first_pass.tolist())) == 768
    data = ConcatenatedDataset([range(1000), range(5000, 6000)])
    assert data.sizes == [1000, 1000]
    assert [data[i] for i in (0, 999, 1000, 1999)] == [0, 999, 5000, 5999]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 9), st.integers(0, 3))
def test_a_block_order_is_a_permutation_that_stays_near(
    num_samples: int, block_size: int, num_window_blocks: int, epoch: int
) -> None:
    order = BlockOrder(num_samples, block_size, num_window_blocks, seed=2)
    indices = order.indices(epoch, 0, num_samples)
    assert np.array_equal(np.sort(indices), np.arange(num_samples))
    size = min(block_size, num_samples)
    for window in np.array_split(indices, range(size * num_window_blocks, num_samples, size * num_window_blocks)):
        # a window touches few stretches of storage: its blocks, the left-over samples, and a wrap around the end
        stretches = 1 + int((np.diff(np.sort(window)) > 1).sum())
        assert stretches <= num_window_blocks + 2


def test_blocks_are_shuffled_and_begin_elsewhere_each_epoch() -> None:
    order = BlockOrder(1003, 10, 5)
    last = [frozenset(order.indices(epoch, 1000, 1003).tolist()) for epoch in range(20)]
    assert len(set(last)) > 15
    assert abs(np.corrcoef(order.indices(0, 0, 1003), np.arange(1003))[0, 1]) < 0.5


def test_the_drop_in_for_distributed_sampler_pads_nothing() -> None:
    for num_samples, world_size in [(10, 3), (2, 3), (103, 4)]:
        ranks = [GlobalSampler(range(num_samples), world_size, rank, seed=1) for rank in range(world_size)]
        for sampler in ranks:
            sampler.set_epoch(5)
        parts = [list(sampler) for sampler in ranks]
        assert [len(part) for part in parts] == [len(sampler) for sampler in ranks]
        assert Counter(itertools.chain(*parts)) == Counter(range(num_samples))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        order = GlobalOrder(num_samples, 1).indices(5, 0, num_samples).tolist()
        assert parts[0] == order[::world_size]
    equal = [list(GlobalSampler(range(10), 3, rank, drop_last=True)) for rank in range(3)]
    assert [len(part) for part in equal] == [3, 3, 3]


def test_the_drop_in_resumes_at_another_world_size() -> None:
    first = [GlobalSampler(range(50), 2, rank) for rank in range(2)]
    used = [sample for sampler in first for sample in list(sampler)[:9]]
    first[0].commit(18)
    state = json.loads(json.dumps(first[0].state_dict()))
    second = [GlobalSampler(range(50), 3, rank) for rank in range(3)]
    for sampler in second:
        sampler.load_state_dict(state)
        sampler.set_epoch(0)
        used += list(sampler)
    assert Counter(used) == Counter(range(50))
    with pytest.raises(DataError, match="seed=4"):
        GlobalSampler(range(50), 2, 0, seed=4).load_state_dict(state)
    with pytest.raises(DataError, match="leaves nothing"):
        GlobalSampler(range(2), 3, 0, drop_last=True)
