"""Streams: each element once, in the same batches whatever the workers, and on from the cursor."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from everyrank.data.iterable import ShardedIterable
from everyrank.errors import DataError


class Numbers:
    """A stream that counts how many elements were read from it."""

    def __init__(self, stop: int, start: int = 0) -> None:
        self.start, self.stop, self.epoch = start, stop, 0
        self.num_read = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for number in range(self.start, self.stop):
            self.num_read += 1
            yield number + 1000 * self.epoch


class Skippable(Numbers):
    def skip(self, num: int) -> Numbers:
        other = Numbers(self.stop, start=num)
        other.epoch = self.epoch
        return other


class WithState(Numbers):
    """A stream that says where it is, in words of its own."""

    place = 0

    def __iter__(self) -> Iterator[int]:
        while self.place < self.stop:
            self.place += 1
            self.num_read += 1
            yield self.place - 1

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


def batches(stream: ShardedIterable, num_workers: int = 0) -> list[list[int]]:
    loader = DataLoader(stream, batch_size=stream.batch_size, num_workers=num_workers)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_each_global_batch_and_workers_change_nothing(drop_last: bool) -> None:
    options = {"batch_size": 3, "world_size": 2, "drop_last": drop_last}
    for num_workers in (0, 2):
        ranks = [batches(ShardedIterable(Numbers(32), rank=rank, **options), num_workers) for rank in range(2)]
        assert ranks[0][:2] == [[0, 1, 2], [6, 7, 8]]
        assert ranks[1][:2] == [[3, 4, 5], [9, 10, 11]]
        used = sorted(itertools.chain(*ranks[0], *ranks[1]))
        assert used == list(range(30 if drop_last else 32))
        if drop_last:
            assert len(ranks[0]) == len(ranks[1]) == 5


@pytest.mark.parametrize("kind", [Numbers, Skippable, WithState])
def test_it_goes_on_at_the_cursor_at_another_world_size(kind: type[Numbers]) -> None:
    first = [ShardedIterable(kind(40), batch_size=3, rank=rank, world_size=2) for rank in range(2)]
    used = []
    for stream in first:
        loader = iter(DataLoader(stream, batch_size=3))
        for _ in range(4):
            used += next(loader).tolist()
        stream.commit(4)
        next(loader)  # read, but not committed
    state = json.loads(json.dumps(first[0].state_dict()))
    assert state["position"] == 24
    source = kind(40)
    second = ShardedIterable(source, batch_size=6)
    second.load_state_dict(state)
    second.set_epoch(0)
    used += list(itertools.chain(*batches(second)))
    assert sorted(used) == list(range(40))
    if kind is WithState:
        assert source.num_read == 16, "the source's own state spares reading again"
    if kind is Skippable:
        assert source.num_read == 0


def test_epochs_reach_the_source_and_transforms_see_kept_elements_only() -> None:
    seen = []

    def note(number: int) -> int:
        seen.append(number)
        return -number

    stream = ShardedIterable(Numbers(8), batch_size=2, rank=1, world_size=2, transform=note)
    stream.set_epoch(3)
    assert batches(stream) == [[-3002, -3003], [-3006, -3007]]
    assert seen == [3002, 3003, 3006, 3007]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(DataError, match="batch_size=0"):
        ShardedIterable([], batch_size=0)
    state = ShardedIterable([], batch_size=4).state_dict()
    with pytest.raises(DataError, match="global batches of 4"):
        ShardedIterable([], batch_size=3).load_state_dict(state)


def test_elements_may_be_anything() -> None:
    stream = ShardedIterable([{"x": torch.ones(2), "name": "a"}] * 5, batch_size=2)
    assert [len(batch["name"]) for batch in DataLoader(stream, batch_size=2)] == [2, 2, 1]
