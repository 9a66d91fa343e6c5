"""Global batches are the same at every world size; the cursor is exact, free of ranks, and moved by commits alone."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from everyrank.data.permutation import GlobalPermutation
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import DataError


def samplers(num_samples: int, global_batch_size: int, world_size: int, **options) -> list[GlobalBatchSampler]:
    return [
        GlobalBatchSampler(
            num_samples, global_batch_size=global_batch_size, rank=rank, world_size=world_size, seed=5, **options
        )
        for rank in range(world_size)
    ]


def global_batches(ranks: list[GlobalBatchSampler]) -> list[list[int]]:
    """Return what all ranks together train on, batch by batch from the cursor on, without placeholders."""
    first = ranks[0].next_batch
    locals_ = [list(sampler) for sampler in ranks]
    assert len({len(batches) for batches in locals_}) == 1, "every rank must take part in every step"
    batches = []
    for number, parts in enumerate(zip(*locals_, strict=True), start=first):
        batch = []
        for sampler, part in zip(ranks, parts, strict=True):
            share = sampler.share(number)
            assert len(part) == max(share.num_local, 1)
            batch += part[: share.num_local]
        assert len(batch) == ranks[0].share(number).num_global
        batches.append(batch)
    return batches


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_every_world_size_trains_on_the_same_batches(
    num_samples: int, global_batch_size: int, world_size: int, drop_last: bool, epoch: int
) -> None:
    if drop_last and global_batch_size > num_samples:
        return
    alone = samplers(num_samples, global_batch_size, 1, drop_last=drop_last)
    ranks = samplers(num_samples, global_batch_size, world_size, drop_last=drop_last)
    for sampler in alone + ranks:
        sampler.set_epoch(epoch)
    batches = global_batches(ranks)
    assert batches == global_batches(alone)
    flat = [sample for batch in batches for sample in batch]
    num_used = num_samples - num_samples % global_batch_size if drop_last else num_samples
    assert flat == GlobalPermutation(num_samples, 5).indices(epoch, 0, num_used).tolist()
    assert len(batches) == len(ranks[0])
    for number in range(len(batches)):
        sizes = [sampler.share(number).num_local for sampler in ranks]
        assert max(sizes) - min(sizes) <= 1


def test_large_batches_take_another_path_to_the_same_samples() -> None:
    alone, ranks = samplers(10_000, 3000, 1), samplers(10_000, 3000, 3)
    assert global_batches(ranks) == global_batches(alone)
    tiny_last = samplers(9001, 3000, 3)
    assert [len(part) for part in list(tiny_last[2])] == [1000, 1000, 1000, 1]
    assert global_batches(tiny_last)[-1] == GlobalPermutation(9001, 5).indices(0, 9000, 9001).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 120), st.integers(1, 20), st.data())
def test_resuming_at_other_world_sizes_loses_and_repeats_nothing(
    num_samples: int, global_batch_size: int, data: st.DataObject
) -> None:
    expected = global_batches(samplers(num_samples, global_batch_size, 1))
    ranks = samplers(num_samples, global_batch_size, data.draw(st.integers(1, 4)))
    used: list[list[int]] = []
    while len(used) < len(expected):
        num_batches = data.draw(st.integers(1, len(expected) - len(used)))
        used += global_batches(ranks)[:num_batches]
        for sampler in ranks:
            sampler.commit(num_batches)
        state = json.loads(json.dumps(ranks[0].state_dict()))
        # the global batch size given now is ignored: the saved one is kept
        ranks = samplers(num_samples, data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4)))
        for sampler in ranks:
            sampler.load_state_dict(state)
    assert used == expected


def test_the_cursor_moves_by_commits_alone() -> None:
    sampler = GlobalBatchSampler(103, global_batch_size=10)
    loader = iter(DataLoader(TensorDataset(torch.arange(103)), batch_sampler=sampler))
    for _ in range(4):
        next(loader)
    assert sampler.position == 0
    sampler.commit()
    sampler.commit(2)
    assert (sampler.position, sampler.next_batch) == (30, 3)
    assert next(iter(sampler)) == list(GlobalBatchSampler(103, global_batch_size=10))[3]
    sampler.commit(100)
    assert (sampler.position, sampler.next_batch, list(sampler)) == (103, 11, [])


def test_setting_the_current_epoch_again_keeps_the_cursor() -> None:
    sampler = GlobalBatchSampler(30, global_batch_size=10)
    sampler.set_epoch(2)
    sampler.commit()
    sampler.set_epoch(2)
    assert sampler.position == 10
    sampler.set_epoch(3)
    assert (sampler.epoch, sampler.position) == (3, 0)


def test_starting_deep_inside_a_huge_epoch_reads_nothing_before() -> None:
    sampler = GlobalBatchSampler(10**12, global_batch_size=8)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 4, "position": 8 * 10**10})
    assert next(iter(sampler)) == GlobalPermutation(10**12).indices(4, 8 * 10**10, 8 * 10**10 + 8).tolist()


def test_the_kept_batch_size_is_said(caplog: pytest.LogCaptureFixture) -> None:
    saved = GlobalBatchSampler(30, global_batch_size=10).state_dict()
    sampler = GlobalBatchSampler(30, global_batch_size=4)
    with caplog.at_level(logging.INFO, logger="everyrank"):
        sampler.load_state_dict(saved)
    assert sampler.global_batch_size == 10
    assert "stays 10" in caplog.text


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (GlobalBatchSampler(31, global_batch_size=10), "num_samples=30"),
        (GlobalBatchSampler(30, global_batch_size=10, seed=1), "seed=0"),
        (GlobalBatchSampler(30, global_batch_size=10, shuffle=False), "shuffle=True"),
        (GlobalBatchSampler(30, global_batch_size=10, drop_last=True), "drop_last=False"),
    ],
)
def test_a_state_of_another_order_is_refused(other: GlobalBatchSampler, named: str) -> None:
    with pytest.raises(DataError, match=named):
        other.load_state_dict(GlobalBatchSampler(30, global_batch_size=10).state_dict())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"global_batch_size": 40, "drop_last": True}, "drop_last=True"),
        ({"global_batch_size": 4, "rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_impossible_settings_are_refused(options: dict, named: str) -> None:
    with pytest.raises(DataError, match=named):
        GlobalBatchSampler(30, **options)


def test_the_gradient_is_that_of_one_process_when_losses_are_weighted_by_count() -> None:
    """The rule of the docstring: mean over ranks of (local mean loss x num_local x world_size / num_global)."""
    torch.manual_seed(0)
    data, target = torch.randn(13, 3, dtype=torch.float64), torch.randn(13, dtype=torch.float64)

    def gradient(batch: list[int], scale: float) -> torch.Tensor:
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        ((data[batch] @ weight - target[batch]).square().mean() * scale).backward()
        return weight.grad

    whole = list(GlobalBatchSampler(13, global_batch_size=5, seed=5))
    for world_size in (2, 3, 7):
        ranks = samplers(13, 5, world_size)
        for number, parts in enumerate(zip(*ranks, strict=True)):
            shares = [sampler.share(number) for sampler in ranks]
            scaled = [
                gradient(part, share.num_local * world_size / share.num_global)
                for part, share in zip(parts, shares, strict=True)
            ]
            assert torch.allclose(torch.stack(scaled).mean(0), gradient(whole[number], 1.0), rtol=0, atol=1e-14)
