"""Loaders: batches fetched whole where the data allow it, and torch's DataLoader with workers where they do not.

For small models most of a step can go into making the batch: indexing samples one by one and stacking them. Data that
lie in memory as tensors need none of that, one ``index_select`` makes the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, Subset, TensorDataset, default_collate

from everyrank.data.containers import map_tensors
from everyrank.data.randomness import SeededDataset, tell_epoch
from everyrank.data.split import View
from everyrank.errors import DataError

Collate = Callable[[list[Any]], Any]


@runtime_checkable
class BatchDataset(Protocol):
    """A dataset that makes a batch itself."""

    def get_batch(self, indices: Sequence[int]) -> Any:
        """Return the samples at ``indices`` as one batch, as the model takes it."""
        ...


class BatchLoader:
    """Iterates over the batches of a batch sampler in this process, fetching each with one call.

    Attributes:
        dataset: Where samples come from.
        batch_sampler: Which samples make each batch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_sampler: Sampler[list[int]],
        fetch: Callable[[list[int]], Any],
        pin_memory: bool,
        source: Any = None,
    ) -> None:
        self.dataset = dataset
        self._source = source if source is not None else dataset  # what is told the epoch
        self.batch_sampler = batch_sampler
        self._fetch = fetch
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        """Return the number of batches that the sampler names."""
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches from the sampler's cursor on."""
        _tell_epoch(self._source, self.batch_sampler)
        fetch = self._fetch
        if not self._pin_memory:
            return (fetch(indices) for indices in self.batch_sampler)
        return (_pinned(fetch(indices)) for indices in self.batch_sampler)


class WorkerLoader(DataLoader):
    """torch's DataLoader, which also tells the dataset the sampler's epoch before each iteration."""

    def __iter__(self) -> Any:
        """Start the workers, or set those at work to the new epoch."""
        _tell_epoch(self.dataset, self.batch_sampler)
        return super().__iter__()

    def end_workers(self) -> None:
        """Let the workers end by themselves; the next iteration starts new ones.

        Else they end with the loader. Where that is freed by the garbage collector (any caught exception may keep the
        frames that hold it), their queues are gone by then: they are waited for 5 s and killed.
        """
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def make_loader(
    dataset: Any,
    batch_sampler: Sampler[list[int]],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    collate_fn: Collate | None = None,
) -> BatchLoader | WorkerLoader:
    """Return the fastest loader that gives the batches of ``batch_sampler``.

    Without workers and without a ``collate_fn``, batches of a ``TensorDataset``, of a subset of one, and of a dataset
    with ``get_batch`` are fetched whole. Everything else goes sample by sample (or through ``__getitems__``) and is
    collated as torch does it; PyTorch Geometric graphs become a ``Batch``.

    What a sample draws at random (augmentation) belongs to the sample: see ``SeededDataset``. It is the same whichever
    rank loads it, here or in a worker, and another in each epoch. The seed is the sampler's.

    Args:
        dataset: Has ``__getitem__``, ``__getitems__`` or ``get_batch``. If it has ``set_epoch``, that is called with
            the sampler's epoch before each iteration, in the workers too.
        batch_sampler: Names the samples of each batch.
        num_workers: Number of worker processes; they are kept over epochs. 0 loads in this process.
        pin_memory: Give batches in page-locked memory, for faster copies to a GPU.
        prefetch_factor: Number of batches each worker loads ahead; None for torch's default.
        collate_fn: Makes a batch of a list of samples.

    Raises:
        DataError: If ``num_workers`` is negative.
    """
    if num_workers < 0:
        raise DataError(f"num_workers={num_workers} was set; it must be 0 (load in this process) or more.")
    if num_workers == 0:
        fetch = _whole_batches(dataset) if collate_fn is None else None
        if fetch is not None:
            return BatchLoader(dataset, batch_sampler, fetch, pin_memory)
        seeded = _seeded(dataset, batch_sampler)
        made = collate_fn or collate

        def fetch_each(indices: list[int]) -> Any:
            return made(seeded.__getitems__(indices))

        return BatchLoader(dataset, batch_sampler, fetch_each, pin_memory, source=seeded)
    return WorkerLoader(
        _seeded(dataset, batch_sampler),
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=True,
        collate_fn=collate_fn or collate,
    )


def collate(samples: list[Any]) -> Any:
    """Make a batch of samples: a PyTorch Geometric ``Batch`` of graphs, else what torch's ``default_collate`` makes."""
    # Samples can only be graphs if their library has been imported; this never imports it for others.
    if "torch_geometric.data" in sys.modules:
        from torch_geometric.data import Batch
        from torch_geometric.data.data import BaseData

        if isinstance(samples[0], BaseData):
            return Batch.from_data_list(samples)
    return default_collate(samples)


def _whole_batches(dataset: Any) -> Callable[[list[int]], Any] | None:
    """Return a function that makes a whole batch of these data, if there is a way."""
    if isinstance(dataset, BatchDataset):
        return dataset.get_batch
    if type(dataset) is TensorDataset:
        tensors = dataset.tensors
        # A list, because default_collate makes a list of samples that are tuples.
        return lambda indices: [t.index_select(0, torch.tensor(indices, device=t.device)) for t in tensors]
    if type(dataset) in (Subset, View):
        inner = _whole_batches(dataset.dataset)
        if inner is not None:
            positions = np.asarray(dataset.indices)
            return lambda indices: inner(positions[indices].tolist())
    return None


def _seeded(dataset: Any, batch_sampler: Any) -> SeededDataset:
    if isinstance(dataset, SeededDataset):
        return dataset
    return SeededDataset(dataset, seed=getattr(batch_sampler, "seed", 0))


def _tell_epoch(dataset: Any, batch_sampler: Any) -> None:
    if hasattr(batch_sampler, "epoch"):
        tell_epoch(dataset, batch_sampler.epoch)


def _pinned(batch: Any) -> Any:
    return map_tensors(
        batch,
        lambda tensor: tensor.pin_memory(),
        lambda item: item.pin_memory() if hasattr(item, "pin_memory") else item,
    )
