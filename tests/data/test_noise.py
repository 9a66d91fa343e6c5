"""Augmentation belongs to the sample and the epoch: not to the rank, the worker, or where a run was cut."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset

from everyrank.data.loader import make_loader
from everyrank.data.sampler import GlobalBatchSampler

NUM_SAMPLES = 17


class Noisy(Dataset):
    """Draws from all global generators, for some samples only, and tells the epoch it was told."""

    def __init__(self, first: int) -> None:
        self.first, self.epoch = first, -1

    def __len__(self) -> int:
        return NUM_SAMPLES

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> tuple[int, int, float, float, float]:
        if index % 3 == self.first:
            return index, self.epoch, random.gauss(0, 1), np.random.normal(), torch.randn(()).item()
        return index, self.epoch, 0.0, 0.0, 0.0


def draw(seed: int, world_size: int, num_workers: int, batch: int, start: int, num_epochs: int) -> dict[Any, Any]:
    """Load some epochs on all ranks, the first from batch ``start`` on; return what each sample drew in each."""
    drawn: dict[Any, Any] = {}
    for rank in range(world_size):
        random.seed(rank)  # a rank's own generators have nothing to do with it
        np.random.seed(rank)
        torch.manual_seed(rank)
        dataset = Subset(ConcatDataset([Subset(Noisy(seed % 3), range(NUM_SAMPLES))]), range(NUM_SAMPLES))
        sampler = GlobalBatchSampler(NUM_SAMPLES, global_batch_size=batch, rank=rank, world_size=world_size, seed=seed)
        sampler.commit(start)
        loader = make_loader(dataset, sampler, num_workers=num_workers)
        for epoch in range(num_epochs):
            sampler.set_epoch(epoch)
            for rows in loader:
                for index, told, *values in zip(*(column.tolist() for column in rows), strict=True):
                    assert told == epoch, f"a worker was told epoch {told} in epoch {epoch}"
                    assert drawn.setdefault((epoch, index), values) == values, "a placeholder is its sample"
        del loader
    return drawn


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**40),
    world_size=st.integers(1, 3),
    num_workers=st.integers(0, 2),
    batch=st.integers(1, 9),
    start=st.integers(0, 2),
)
def test_noise_is_the_samples_own(seed: int, world_size: int, num_workers: int, batch: int, start: int) -> None:
    alone = draw(seed, 1, 0, 5, 0, 3)
    assert len(alone) == 3 * NUM_SAMPLES
    noise = [tuple(values) for values in alone.values() if any(values)]
    assert len(set(noise)) == len(noise) >= 15, "another sample or epoch draws other numbers"
    found = draw(seed, world_size, num_workers, batch, start, 3)
    assert found == {key: alone[key] for key in found}
    assert all((epoch, index) in found for epoch in (1, 2) for index in range(NUM_SAMPLES))


def test_a_dataset_that_draws_nothing_leaves_the_generators_alone() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loader = make_loader(list(range(10)), GlobalBatchSampler(10, global_batch_size=3))
    assert torch.cat(list(loader)).sort().values.tolist() == list(range(10))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
