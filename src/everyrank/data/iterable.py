"""Streams shared by ranks and loader workers.

What can be exact: the elements of a stream that gives the same elements in the same order every time it is read. Each
is then used exactly once an epoch, in the same global batches, with any number of workers; and a resumed run goes on
at the next global batch, also at another world size as long as ``batch_size * world_size`` stays the same.

What cannot be exact, and no loader can make it so:

- A stream whose order changes from reading to reading (files listed anew, a shuffle seeded by the clock, a queue other
  consumers take from) has no position to come back to: a resumed run repeats some elements and misses others.
- The end is not known beforehand. The last global batch may be short, and some ranks get no batch where others get one;
  under DDP use ``drop_last=True``, or stop after an agreed number of steps.
- Without ``skip`` or ``state_dict`` the stream is read from the start and thrown away up to the cursor: exact, but not
  O(1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from everyrank.data.sampler import check_rank
from everyrank.errors import DataError


class ShardedIterable(IterableDataset):
    """This rank's part of a stream, for a ``DataLoader`` with the same ``batch_size`` and any number of workers.

    Global batch ``b`` is the ``batch_size * world_size`` elements from number ``b * batch_size * world_size`` on; rank
    ``r`` gets the ``r``-th ``batch_size`` of them. Loader workers take this rank's batches in turn, which is the order
    in which the loader gives them out, so that their number changes nothing.

    Every worker of every rank reads the whole stream and keeps its part; put decoding into ``transform``, which is
    applied to kept elements only.

    The cursor counts elements of the whole stream and is moved by ``commit`` alone. It is reached through the source's
    ``load_state_dict`` if the source has that and no workers are used, through ``skip(n)`` (as Hugging Face's datasets
    have it, returning the stream without its first ``n`` elements) if it has that, else by reading.

    Args:
        source: The stream: an iterable that can be iterated anew for each epoch. Its ``set_epoch`` is called if it has
            one.
        batch_size: Number of elements of a batch on this rank; give the loader the same.
        rank: This process's rank.
        world_size: Number of processes.
        drop_last: Leave out the last global batch if it is short, so that all ranks get equally many batches.
        transform: Applied to each element that this rank keeps.

    Raises:
        DataError: If a number is out of range.
    """

    def __init__(
        self,
        source: Iterable[Any],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        check_rank(rank, world_size)
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size} was given for a stream; it must be at least 1.")
        self.source = source
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.transform = transform
        self._epoch = 0
        self._position = 0
        # The source's own states after global batches that are not yet committed, by position.
        self._source_states: dict[int, Any] = {}

    @property
    def epoch(self) -> int:
        """Number of the current epoch."""
        return self._epoch

    @property
    def global_batch_size(self) -> int:
        """Number of elements of one step over all ranks."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; the cursor stays where it is if that is the current epoch already.

        Persistent workers do not hear of it: let the loader start them anew for each epoch.
        """
        if epoch != self._epoch:
            self._epoch, self._position = int(epoch), 0
            self._source_states.clear()

    def commit(self, num_batches: int = 1) -> None:
        """Move the cursor past ``num_batches`` global batches, after the optimizer step that used them."""
        self._position += num_batches * self.global_batch_size
        self._source_states = {place: state for place, state in self._source_states.items() if place >= self._position}

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, and the source's own state at it if that is known; JSON-able if the source's is."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "global_batch_size": self.global_batch_size,
            "source": self._source_states.get(self._position),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved cursor.

        Raises:
            DataError: If the global batch size has changed.
        """
        if state["global_batch_size"] != self.global_batch_size:
            raise DataError(
                f"The saved stream had global batches of {state['global_batch_size']}, but batch_size="
                f"{self.batch_size} on {self.world_size} ranks makes {self.global_batch_size}. "
                "Set a batch_size that keeps the product."
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._source_states = {} if state.get("source") is None else {self._position: state["source"]}

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's (and this worker's) elements from the cursor on."""
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        position = self._position
        stream = self._open(position, restore=info is None)
        number = 0
        while elements := list(islice(stream, self.global_batch_size)):
            position += len(elements)
            if info is None and hasattr(self.source, "state_dict"):
                self._source_states[position] = self.source.state_dict()
            if self.drop_last and len(elements) < self.global_batch_size:
                return
            if number % num_workers == worker:
                mine = elements[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                yield from mine if self.transform is None else map(self.transform, mine)
            number += 1

    def _open(self, position: int, *, restore: bool) -> Iterator[Any]:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(self._epoch)
        state = self._source_states.get(position)
        if position and restore and state is not None and hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state)
            return iter(self.source)
        if position and hasattr(self.source, "skip"):
            return iter(self.source.skip(position))
        return islice(iter(self.source), position, None)
