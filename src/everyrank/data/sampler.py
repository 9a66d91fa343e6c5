"""Samplers over a global permutation: global batches shared by the ranks, and a cursor that knows no rank.

``GlobalBatchSampler`` is what the trainer uses: the optimizer's steps of an epoch are fixed slices of the epoch's
permutation, and each rank takes its share of every slice. ``GlobalSampler`` (``data/per_sample.py``) is the drop-in
for code that uses ``DistributedSampler``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

from everyrank.data.permutation import GlobalPermutation
from everyrank.errors import DataError

logger = logging.getLogger(__name__)

# Positions whose samples are looked up at once: few large array operations instead of many small ones. A global batch
# larger than the second number is worth an operation of its own, which then computes this rank's share alone.
_LOOK_AHEAD = 16384
_LARGE_BATCH = 2048


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch, as positions in the epoch's permutation.

    Attributes:
        start: First position of this rank.
        stop: One past the last position of this rank; equal to ``start`` if the rank has no sample of this batch.
        global_start: First position of the global batch.
        global_stop: One past the last position of the global batch.
    """

    start: int
    stop: int
    global_start: int
    global_stop: int

    @property
    def num_local(self) -> int:
        """Number of samples this rank holds of the global batch."""
        return self.stop - self.start

    @property
    def num_global(self) -> int:
        """Number of samples of the global batch; the last one of an epoch may be short."""
        return self.global_stop - self.global_start


def split_evenly(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return this rank's contiguous part of ``start .. stop``; the parts' sizes differ by at most one."""
    size, extra = divmod(stop - start, world_size)
    begin = start + rank * size + min(rank, extra)
    return begin, begin + size + (rank < extra)


def split_in_proportion(start: int, stop: int, rank: int, shares: Sequence[float]) -> tuple[int, int]:
    """Return this rank's contiguous part of ``start .. stop``, in proportion to its share, to within one."""
    whole = sum(shares)
    begin, end = (start + round((stop - start) * (sum(shares[:n]) / whole)) for n in (rank, rank + 1))
    return begin, stop if rank == len(shares) - 1 else end


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields, for each global batch of an epoch, the samples of this rank.

    A global batch is a slice of the epoch's permutation: batch ``b`` holds the positions
    ``b * global_batch_size`` up to the next batch.
    The ranks share the slice, evenly or not, so the same global batches are trained on at every world size.

    The cursor counts the samples of the epoch whose optimizer step is done. Only ``commit`` moves it; iterating (and a
    ``DataLoader`` that reads ahead) does not. ``state_dict`` is therefore right at any moment, and loads at any world
    size.

    A rank whose share is empty is given one placeholder, the first sample of the global batch, so that it still takes
    part in the step. Its weight is zero: DDP averages gradients over ranks, so scale a rank's mean loss by
    ``loss_weight(batch)``, which is ``num_local * world_size / num_global`` of its share.

    Args:
        num_samples: Number of samples of the dataset.
        global_batch_size: Number of samples of one optimizer step over all ranks.
        rank: This process's rank.
        world_size: Number of processes.
        seed: Seed of the permutation, the same on all ranks.
        shuffle: If false, samples come in the order of the dataset.
        drop_last: Leave out an epoch's last global batch if it is short.
        shares: A positive number for each rank, in proportion to which they share a global batch; None: evenly.

    Raises:
        DataError: If a number is out of range, or nothing would be left of an epoch.

    Example:
        >>> sampler = GlobalBatchSampler(10, global_batch_size=4, rank=1, world_size=2, shuffle=False)
        >>> list(sampler)
        [[2, 3], [6, 7], [9]]
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        shares: Sequence[float] | None = None,
    ) -> None:
        check_rank(rank, world_size)
        self.permutation = GlobalPermutation(num_samples, seed=seed, shuffle=shuffle)
        self.num_samples = num_samples
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.drop_last = drop_last
        self.set_shares(shares)
        self._set_global_batch_size(global_batch_size)
        self._epoch = 0
        self._position = 0

    def _set_global_batch_size(self, global_batch_size: int) -> None:
        if global_batch_size < 1:
            raise DataError(f"global_batch_size={global_batch_size} was given; it must be at least 1.")
        if self.drop_last and global_batch_size > self.num_samples:
            raise DataError(
                f"drop_last=True with global_batch_size={global_batch_size} leaves nothing of an epoch of "
                f"{self.num_samples} samples. Set drop_last=False or a global_batch_size of at most {self.num_samples}."
            )
        self.global_batch_size = global_batch_size

    @property
    def shares(self) -> list[float] | None:
        """The numbers in proportion to which the ranks share a global batch; None: evenly."""
        return self._shares

    def set_shares(self, shares: Sequence[float] | None) -> None:
        """Let the ranks share global batches otherwise. Call it between epochs, on all ranks with the same numbers.

        Raises:
            DataError: If there is not one positive number for each rank.
        """
        if shares is not None and (len(shares) != self.world_size or not all(0 < n < math.inf for n in shares)):
            raise DataError(
                f"shares={list(shares)} was given for {self.world_size} ranks; it must be one positive number for each."
            )
        self._shares = None if shares is None else list(shares)

    @property
    def epoch(self) -> int:
        """Number of the current epoch."""
        return self._epoch

    @property
    def position(self) -> int:
        """Number of samples of this epoch whose optimizer step is done: the cursor."""
        return self._position

    @property
    def next_batch(self) -> int:
        """Number of the global batch at the cursor; ``len(self)`` when the epoch is done."""
        return min(-(-self._position // self.global_batch_size), len(self))

    def __len__(self) -> int:
        """Return the number of global batches in a whole epoch, wherever the cursor is."""
        if self.drop_last:
            return self.num_samples // self.global_batch_size
        return -(-self.num_samples // self.global_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; the cursor stays where it is if that is the current epoch already.

        So the usual loop, ``for epoch in range(sampler.epoch, num_epochs): sampler.set_epoch(epoch)``, also resumes.
        """
        if epoch != self._epoch:
            self._epoch = int(epoch)
            self._position = 0

    def share(self, batch: int) -> Share:
        """Return this rank's share of global batch ``batch`` of any epoch.

        Raises:
            IndexError: If an epoch has no such batch.
        """
        if not 0 <= batch < len(self):
            raise IndexError(f"global batch {batch} was asked for, but an epoch has {len(self)}")
        global_start = batch * self.global_batch_size
        global_stop = min(global_start + self.global_batch_size, self.num_samples)
        if self._shares is None:
            start, stop = split_evenly(global_start, global_stop, self.rank, self.world_size)
        else:
            start, stop = split_in_proportion(global_start, global_stop, self.rank, self._shares)
        return Share(start, stop, global_start, global_stop)

    def loss_weight(self, batch: int) -> float:
        """Return what to scale this rank's mean loss of a global batch by, so that DDP's mean over ranks is exact."""
        return self.loss_weights(range(batch, batch + 1))[0][0]

    def loss_weights(self, batches: range) -> tuple[list[float], int]:
        """Return what to scale this rank's mean loss of each batch of one optimizer step by, and the step's samples.

        Args:
            batches: The global batches whose gradients are accumulated.

        Returns:
            The factors, and the number of samples over all ranks.
        """
        shares = [self.share(batch) for batch in batches]
        count = sum(share.num_global for share in shares)
        return [share.num_local * self.world_size / count for share in shares], count

    def local_samples(self, batches: range) -> list[int]:
        """Return the samples of this rank in global batches of the current epoch."""
        shares = [self.share(batch) for batch in batches]
        return [i for s in shares for i in self.permutation.indices(self._epoch, s.start, s.stop).tolist()]

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's samples of each global batch from the cursor to the end of the epoch.

        The epoch and the cursor are those of the moment iteration begins. Nothing before the cursor is computed.
        """
        # Not a generator itself: a loader may call iter() long before the first next(), with a commit between them.
        return self._batches(self._epoch, self.next_batch)

    def _batches(self, epoch: int, first_batch: int) -> Iterator[list[int]]:
        if self.global_batch_size > _LARGE_BATCH:
            yield from self._large_batches(epoch, first_batch)
            return
        per_look = max(1, _LOOK_AHEAD // self.global_batch_size)
        for begin in range(first_batch, len(self), per_look):
            shares = [self.share(batch) for batch in range(begin, min(begin + per_look, len(self)))]
            offset = shares[0].global_start
            samples = self.permutation.indices(epoch, offset, shares[-1].global_stop)
            for share in shares:
                if share.num_local:
                    yield samples[share.start - offset : share.stop - offset].tolist()
                else:
                    yield [int(samples[share.global_start - offset])]

    def _large_batches(self, epoch: int, first_batch: int) -> Iterator[list[int]]:
        for batch in range(first_batch, len(self)):
            share = self.share(batch)
            if share.num_local:
                yield self.permutation.indices(epoch, share.start, share.stop).tolist()
            else:
                yield [self.permutation.index(epoch, share.global_start)]

    def commit(self, num_batches: int = 1) -> None:
        """Move the cursor past ``num_batches`` global batches: call it after the optimizer step that used them."""
        batch = min(self.next_batch + num_batches, len(self))
        self._position = min(batch * self.global_batch_size, self.num_samples)

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as JSON-able values, free of rank and world size."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "drop_last": self.drop_last,
            "permutation": repr(self.permutation),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved cursor, at this or another world size.

        The global batch size of the saved run is kept, so that the batches ahead are those it would have used; the log
        says so when that changes the one given to the constructor.

        Raises:
            DataError: If the state belongs to another dataset, seed or ``drop_last``.
        """
        found = {"num_samples": self.num_samples, "permutation": repr(self.permutation), "drop_last": self.drop_last}
        for name, value in found.items():
            if state.get(name, value) != value:
                raise DataError(
                    f"The saved sampler has {name}={state[name]}, but this run has {name}={value}: the rest of the "
                    "epoch would not be the rest of the saved one. Set it as it was, or start anew without resuming."
                )
        global_batch_size = int(state["global_batch_size"])
        if global_batch_size != self.global_batch_size:
            logger.info(
                "the global batch size stays %d as in the saved run (this run asked for %d)",
                global_batch_size,
                self.global_batch_size,
            )
            self._set_global_batch_size(global_batch_size)
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])


def check_rank(rank: int, world_size: int) -> None:
    """Raise DataError unless ``0 <= rank < world_size``."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise DataError(
            f"rank={rank} and world_size={world_size} were given; the rank must be between 0 and world_size - 1. "
            "Take both from the joined world: rank=world.rank, world_size=world.world_size."
        )
