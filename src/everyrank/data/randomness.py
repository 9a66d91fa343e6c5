"""Random numbers that belong to a sample: the same whichever rank or worker loads it.

A sample's augmentation is drawn from a generator of (seed, epoch, sample). It is then free of rank, worker and world
size, and a resumed run augments each sample as the uninterrupted run would have.
"""

from __future__ import annotations

import ctypes
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

_MT19937_WORDS = 624

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
    - neither: Python's, numpy's and torch's global generators are seeded for each sample and put back after the
      batch, some 0.02 ms a sample. That makes transforms exact that know nothing of generators. A dataset that draws
      nothing is found out by the generators, which have not moved after a batch, and costs no seeding.

    A dataset with generators of its own that takes none of these ways draws from them as it likes.

    ``make_loader`` wraps a dataset in this class and calls ``set_epoch`` by itself; with a plain ``DataLoader``, wrap
    it and call ``set_epoch`` before iterating. Workers see the new epoch, also persistent ones, because it lies in
    shared memory, and tell it to the dataset (to those within subsets and concatenations too) before its next sample.

    Args:
        dataset: A dataset with ``__getitem__`` and ``__len__``. Its other attributes are this object's too.
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
        self._told: int | None = None  # the epoch that the dataset in this process knows of
        self._draws = False  # whether it has been seen to draw from the global generators

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def epoch(self) -> int:
        """Number of the current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, here and in all workers that share this dataset."""
        self._epoch.fill_(epoch)
        self._pass_on(epoch)

    def __getitem__(self, index: int) -> Any:
        (sample,) = self.__getitems__([index])
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples, each drawn with randomness of its own."""
        epoch = self.epoch
        self._pass_on(epoch)
        if self.handover != "global":
            return [self._handed_over(epoch, index) for index in indices]
        if not self._draws:
            before = _take_states()
            samples = fetch(self.dataset, indices)
            if _take_states() == before:
                return samples
            self._draws = True
            _go_back(before)
        with _kept_globals():
            samples = []
            for index in indices:
                _seed_globals(sample_seed(self.seed, epoch, index))
                samples.append(self.dataset[index])
            return samples

    def _handed_over(self, epoch: int, index: int) -> Any:
        make = sample_generator if self.kind == "torch" else sample_numpy_generator
        generator = make(self.seed, epoch, index)
        if self.handover == "argument":
            return self.dataset.__getitem__(index, generator=generator)
        self.dataset.set_rng(generator)
        return self.dataset[index]

    def _pass_on(self, epoch: int) -> None:
        if epoch != self._told:
            self._told = epoch
            tell_epoch(self.dataset, epoch)


def fetch(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Return samples of a dataset, all at once where it can."""
    if callable(getattr(dataset, "__getitems__", None)):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Call ``set_epoch`` of a dataset, or of those within it: in a subset, a concatenation, any wrapper."""
    if callable(getattr(dataset, "set_epoch", None)):
        dataset.set_epoch(epoch)
        return
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    for part in inner if isinstance(inner, list | tuple) else ():
        if part is not None:
            tell_epoch(part, epoch)


def _handover(dataset: Any) -> Handover:
    try:
        if "generator" in inspect.signature(type(dataset).__getitem__).parameters:
            return "argument"
    except (AttributeError, ValueError):  # written in C: it has no signature to look at
        pass
    return "set_rng" if callable(getattr(dataset, "set_rng", None)) else "global"


def _take_states() -> tuple[Any, bytes, bytes]:
    """Return the states of Python's, numpy's and torch's global generators, to compare them and to go back.

    numpy's is read from memory, which takes 1 us where ``get_state`` takes 60; a normal number that it may have put by
    is not in it.
    """
    address = np.random.get_bit_generator().ctypes.state_address  # type: ignore[attr-defined]
    numpy_state = ctypes.string_at(address, 4 * _MT19937_WORDS + 4)
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()


def _go_back(states: tuple[Any, bytes, bytes]) -> None:
    words = np.frombuffer(states[1], dtype=np.uint32)
    random.setstate(states[0])
    np.random.set_state(("MT19937", words[:_MT19937_WORDS], int(words[_MT19937_WORDS]), 0, 0.0))
    torch.set_rng_state(torch.frombuffer(bytearray(states[2]), dtype=torch.uint8))


def _seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # The CPU's default generator alone: torch.manual_seed would reset the GPU's as well, for good.
    torch.default_generator.manual_seed(seed)


@contextmanager
def _kept_globals() -> Iterator[None]:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
