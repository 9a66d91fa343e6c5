"""Loaders give the batches that a DataLoader gives, by shorter ways, and bring samples their own random numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torch_geometric.data import Batch, Data

from everyrank.data.loader import BatchLoader, WorkerLoader, make_loader
from everyrank.data.randomness import SeededDataset, sample_generator, sample_numpy_generator, sample_seed
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.data.split import View
from everyrank.errors import DataError

TENSORS = TensorDataset(torch.arange(40.0).view(20, 2), torch.arange(20))


class Words(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict:
        return {"number": index, "word": str(index), "pair": (index, torch.ones(2) * index)}


class Listed(Words):
    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [self[index] for index in indices]


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize(
    "dataset",
    [
        TENSORS,
        Subset(TENSORS, list(range(3, 19))),
        View(TENSORS, np.arange(19, 3, -1)),
        View(Subset(TENSORS, range(2, 20)), [5, 1, 3, 2]),
        Words(),
        Listed(),
        View(Listed(), [4, 2, 9]),
        [torch.tensor([i, i + 1]) for i in range(15)],
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_batches_are_those_of_a_dataloader(dataset: object) -> None:
    sampler = GlobalBatchSampler(len(dataset), global_batch_size=4, seed=1)
    loader = make_loader(dataset, sampler)
    assert isinstance(loader, BatchLoader)
    assert loader.dataset is dataset
    assert loader.batch_sampler is sampler
    assert len(loader) == len(sampler)
    for _ in range(2):
        expected = list(DataLoader(dataset, batch_sampler=sampler))
        assert same(list(loader), expected)
    sampler.commit()
    assert same(list(loader), expected[1:])


def test_workers_give_the_same_and_stay_for_the_next_epoch() -> None:
    sampler = GlobalBatchSampler(20, global_batch_size=4, seed=1)
    loader = make_loader(Words(), sampler, num_workers=1, prefetch_factor=1)
    assert isinstance(loader, WorkerLoader)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert same(list(loader), list(make_loader(Words(), sampler)))
    assert loader.persistent_workers


def test_a_dataset_may_make_whole_batches_and_a_collate_fn_is_obeyed() -> None:
    class Whole(Words):
        def get_batch(self, indices: list[int]) -> torch.Tensor:
            return torch.tensor(indices) * 2

    sampler = GlobalBatchSampler(20, global_batch_size=4, shuffle=False)
    assert next(iter(make_loader(Whole(), sampler))).tolist() == [0, 2, 4, 6]
    view = make_loader(View(Whole(), range(19, -1, -1)), sampler)
    assert next(iter(view)).tolist() == [38, 36, 34, 32]
    assert next(iter(make_loader(Whole(), sampler, collate_fn=len))) == 4
    assert next(iter(make_loader(TENSORS, sampler, collate_fn=len))) == 4


def test_graphs_become_a_batch() -> None:
    graphs = [
        Data(x=torch.full((i + 1, 2), float(i)), edge_index=torch.zeros(2, i, dtype=torch.long)) for i in range(6)
    ]
    sampler = GlobalBatchSampler(6, global_batch_size=4, shuffle=False)
    batches = list(make_loader(graphs, sampler))
    assert [type(batch) for batch in batches] == [type(Batch.from_data_list(graphs[:4]))] * 2
    assert [batch.num_graphs for batch in batches] == [4, 2]
    assert batches[1].x.shape == (11, 2)


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(DataError, match="num_workers=-1"):
        make_loader(TENSORS, GlobalBatchSampler(20, global_batch_size=4), num_workers=-1)


class Global(Words):
    """Draws from the global generators, as most transforms do."""

    def __getitem__(self, index: int) -> tuple:
        return index, torch.rand(()).item(), random.random(), np.random.rand()


class Argument(Words):
    def __getitem__(self, index: int, generator: torch.Generator | None = None) -> tuple:
        return index, torch.rand((), generator=generator).item()


class SetRng(Words):
    def set_rng(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __getitem__(self, index: int) -> tuple:
        return index, self.rng.random()


@pytest.mark.parametrize(
    ("kind", "handover", "generator"),
    [(Global, "global", "torch"), (Argument, "argument", "torch"), (SetRng, "set_rng", "numpy")],
)
def test_random_numbers_belong_to_samples_not_to_ranks_or_workers(kind: type, handover: str, generator: str) -> None:
    def draw(world_size: int, num_workers: int) -> dict:
        drawn = {}
        for rank in range(world_size):
            dataset = SeededDataset(kind(), seed=7, kind=generator)
            assert dataset.handover == handover
            sampler = GlobalBatchSampler(20, global_batch_size=8, rank=rank, world_size=world_size)
            loader = make_loader(dataset, sampler, num_workers=num_workers)
            for epoch in range(3):
                sampler.set_epoch(epoch)
                for batch in loader:
                    for index, *values in zip(*(column.tolist() for column in batch), strict=True):
                        drawn[epoch, index] = values
        return drawn

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    alone = draw(1, 0)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len(alone) == 60
    assert len({tuple(values) for values in alone.values()}) == 60
    assert draw(3, 0) == alone
    assert draw(1, 2) == alone


def test_seeds_are_frozen_and_generators_follow_them() -> None:
    assert sample_seed(1, 2, 3) == 13156657744880835741
    assert len({sample_seed(s, e, i) for s in range(10) for e in range(10) for i in range(10)}) == 1000
    for make in (sample_generator, sample_numpy_generator):
        draws = [make(0, 1, index) for index in (5, 5, 6)]
        numbers = [
            torch.rand((), generator=draw).item() if isinstance(draw, torch.Generator) else draw.random()
            for draw in draws
        ]
        assert numbers[0] == numbers[1] != numbers[2]


def test_an_unknown_kind_of_generator_is_refused() -> None:
    with pytest.raises(DataError, match="kind='jax'"):
        SeededDataset(Words(), kind="jax")
