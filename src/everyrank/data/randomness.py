"""Random numbers that belong to a sample: the same whichever rank or worker loads it.

A sample's augmentation is drawn from a generator of (seed, epoch, sample). It is then free of rank, worker and world
size, and a resumed run augments each sample as the uninterrupted run would have.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from everyrank.errors import DataError

Handover = Literal["argument", "set_rng", "global"]


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return a 64-bit seed for one sample in one epoch, unrelated to that of any other."""
    message = f"everyrank sample 1: seed {seed}, epoch {epoch}, sample {index}"
    return int.from_bytes(hashlib.blake2b(message.encode(), digest_size=8).digest(), "little")


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return a torch CPU generator for one sample in one epoch.

    torch keeps 32 bits of a CPU generator's seed, so two of very many samples may draw the same numbers; numpy's
    generator keeps all 64.
    """
    generator = torch.Generator()
    generator.manual_seed(sample_seed(seed, epoch, index))
    return generator


def sample_numpy_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return a numpy generator (Philox) for one sample in one epoch."""
    return np.random.Generator(np.random.Philox(key=sample_seed(seed, epoch, index)))


class SeededDataset(Dataset):
    """Hands the wrapped dataset a generator for each sample, also inside the workers of a loader.

    The wrapped dataset gets it in the first of these ways that it has:

    - ``__getitem__(index, generator=...)``: as an argument;
    - ``set_rng(generator)``: called before ``__getitem__(index)``;
    - neither: Python's, numpy's and torch's global generators are seeded for the length of ``__getitem__(index)`` and
      put back afterwards. That makes transforms exact that know nothing of generators, at some 0.1 ms a sample.

    ``make_loader`` calls ``set_epoch`` by itself; with a plain ``DataLoader``, call it before iterating over that.
    Workers see the new epoch, also persistent ones, because it lies in shared memory.

    Args:
        dataset: A dataset with ``__getitem__`` and ``__len__``.
        seed: Seed, the same on all ranks.
        kind: Which generator to hand over: ``"torch"`` or ``"numpy"``.
    """

    def __init__(self, dataset: Any, seed: int = 0, kind: Literal["torch", "numpy"] = "torch") -> None:
        if kind not in ("torch", "numpy"):
            raise DataError(f"kind={kind!r} was given for the samples' generators. Use 'torch' or 'numpy'.")
        self.dataset = dataset
        self.seed = seed
        self.kind = kind
        self.handover = _handover(dataset)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def epoch(self) -> int:
        """Number of the current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, here and in all workers that share this dataset."""
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> Any:
        epoch = self.epoch
        if self.handover == "global":
            with _global_seed(sample_seed(self.seed, epoch, index)):
                return self.dataset[index]
        make = sample_generator if self.kind == "torch" else sample_numpy_generator
        generator = make(self.seed, epoch, index)
        if self.handover == "argument":
            return self.dataset.__getitem__(index, generator=generator)
        self.dataset.set_rng(generator)
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples one by one: each has a generator of its own."""
        return [self[index] for index in indices]


def _handover(dataset: Any) -> Handover:
    try:
        if "generator" in inspect.signature(type(dataset).__getitem__).parameters:
            return "argument"
    except (AttributeError, ValueError):  # written in C: it has no signature to look at
        pass
    return "set_rng" if callable(getattr(dataset, "set_rng", None)) else "global"


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # The CPU's default generator alone: torch.manual_seed would reset the GPU's as well, for good.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
