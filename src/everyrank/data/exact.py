"""``everyrank.exact(loader)``: exactness for training loops that are not ours, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from everyrank.data.containers import map_tensors
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import DataError
from everyrank.runtime.process_group import current_world


def exact(loader: Any, *, seed: int = 0) -> ExactLoader:
    """Give a loader one global order, shares by count, and a cursor that knows no rank and no worker.

    Each sample of an epoch is in exactly one rank's batch, at every world size: nothing is padded or left out. A loop
    that is killed and goes on, also on another number of ranks, sees each sample once.

    Call it where ranks know each other (after ``init_process_group``, ``Accelerator()`` or ``fabric.launch()``), before
    or after ``accelerator.prepare`` and ``fabric.setup_dataloaders``; batches go to the device that those chose.

    Args:
        loader: A ``torch.utils.data.DataLoader``, or one prepared by Accelerate or Fabric. Its batch size is that of
            one rank, as for DDP; with Accelerate's ``split_batches`` it is the global one.
        seed: Seed of the order, the same on all ranks and at every world size.

    Returns:
        The loader to iterate over.

    Raises:
        DataError: The loader's order is not ours to make: an iterable dataset, a sampler of the user's own, batches of
            no fixed size.

    Example:
        >>> loader = everyrank.exact(DataLoader(dataset, batch_size=32, shuffle=True))
        >>> for epoch in range(loader.epoch, num_epochs):
        ...     for batch in loader:
        ...         train(batch)
        ...         save(model, loader=loader.state_dict())
    """
    return ExactLoader(loader, seed=seed)


class ExactLoader:
    """Iterates over this rank's shares of the global batches; made by :func:`exact`.

    Attributes:
        dataset: The dataset of the loader that was given.
    """

    def __init__(self, loader: Any, *, seed: int = 0) -> None:
        world = current_world()
        batch_size, drop_last, is_global, sampler = _batches(loader)
        self.dataset = loader.dataset
        self._given = loader
        self._sampler = GlobalBatchSampler(
            len(loader.dataset),
            global_batch_size=batch_size if is_global else batch_size * world.world_size,
            rank=world.rank,
            world_size=world.world_size,
            seed=seed,
            shuffle=_shuffles(sampler),
            drop_last=drop_last,
        )
        workers = loader.num_workers > 0
        self._loader = DataLoader(
            loader.dataset,
            batch_sampler=self._sampler,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=getattr(loader, "multiprocessing_context", None) if workers else None,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor if workers else None,
            persistent_workers=loader.persistent_workers if workers else False,
        )
        self._was_set = False
        self._batch = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration begins, or goes on with: an epoch that is done is not begun again."""
        return self._sampler.epoch + (self._is_done and not self._was_set)

    @property
    def loss_weight(self) -> float:
        """What makes DDP's mean over ranks exact where ranks hold unequal shares: scale this batch's mean loss by it.

        It is 1 but for short batches, and 0 on a rank that holds nothing of one: that rank is given a sample of another
        rank's, so that it takes part in the step.
        """
        return self._sampler.loss_weight(self._batch)

    @property
    def _is_done(self) -> bool:
        return self._sampler.next_batch >= len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, or stay at the cursor if it is the current one. Nobody needs to call it."""
        self._sampler.set_epoch(epoch)
        self._was_set = True

    def __len__(self) -> int:
        """Return the number of global batches of a whole epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches from the cursor on; a batch that was yielded counts as trained on."""
        self._sampler.set_epoch(self.epoch)
        self._was_set = False
        state = self._given if hasattr(self._given, "gradient_state") else None  # Accelerate's: when to synchronise
        device = getattr(self._given, "device", None)

        def move(item: Any) -> Any:
            return item.to(device, non_blocking=True) if hasattr(item, "to") else item

        if state is not None:
            state.begin()
        try:
            for batch in self._loader:
                self._batch = self._sampler.next_batch
                self._sampler.commit()
                if state is not None:
                    state.end_of_dataloader, state.remainder = self._is_done, -1
                yield batch if device is None else map_tensors(batch, move, move)
        finally:
            if state is not None:
                state.end()

    def state_dict(self) -> dict[str, Any]:
        """The cursor as JSON-able values: the batches that were yielded, whatever workers have read ahead."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved cursor, at this or another world size; the saved run's global batch size is kept.

        Raises:
            DataError: The state belongs to another dataset, seed or ``drop_last``.
        """
        self._sampler.load_state_dict(state)
        self._was_set = False


def _batches(loader: Any) -> tuple[int, bool, bool, Any]:
    """Batch size, ``drop_last``, whether the size is that of all ranks together, and the sampler of single samples."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        raise DataError(
            f"exact was given a loader of {type(loader.dataset).__name__}, an iterable dataset, whose order is its "
            "own. Fix: give the dataset __len__ and __getitem__."
        )
    if not hasattr(loader, "batch_sampler") or not hasattr(loader, "dataset"):
        raise DataError(f"exact was given {type(loader).__name__}; it takes a torch.utils.data.DataLoader.")
    batches, is_global = loader.batch_sampler, False
    while hasattr(batches, "batch_sampler"):  # Accelerate's, around the one that the user made
        is_global = is_global or bool(getattr(batches, "split_batches", False))
        batches = batches.batch_sampler
    size = getattr(batches, "batch_size", None)
    if not isinstance(size, int):
        raise DataError(
            "exact was given a loader without a batch size, whose batches are its own. Fix: DataLoader(batch_size=N)."
        )
    return size, bool(batches.drop_last), is_global, batches.sampler


def _shuffles(sampler: Any) -> bool:
    if isinstance(sampler, DistributedSampler):
        return sampler.shuffle
    if isinstance(sampler, SequentialSampler):
        return False
    if isinstance(sampler, RandomSampler) and not sampler.replacement:
        return True
    raise DataError(
        f"exact was given a loader with the sampler {type(sampler).__name__}, whose order is its own. "
        "Fix: leave sampler out and set shuffle=True or False."
    )
