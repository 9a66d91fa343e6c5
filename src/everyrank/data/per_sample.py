"""A sampler of single samples, for code that uses ``torch.utils.data.DistributedSampler``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import Sampler

from everyrank.data.permutation import GlobalPermutation
from everyrank.data.sampler import check_rank
from everyrank.errors import DataError
from everyrank.runtime.process_group import current_world

_LOOK_AHEAD = 16384


class GlobalSampler(Sampler[int]):
    """Takes the place of ``DistributedSampler``, without padding, duplicates, or a list of all indices.

    Rank ``r`` of ``W`` gets the positions ``r, r + W, r + 2W, ...`` of the epoch's permutation. With
    ``batch_size=B`` in each rank's ``DataLoader``,
    the ranks' batches number ``b`` together are the ``B * W`` positions from ``b * B * W`` on.

    Because nothing is padded, ranks may get numbers of samples that differ by one, and so, at the end of an epoch,
    numbers of batches that differ by one: DDP would wait there for the rank that has none. Give ``drop_last=True``,
    or use ``GlobalBatchSampler``, which gives every rank every step and needs to drop nothing.

    Args:
        dataset: Anything with a length.
        num_replicas: Number of ranks; by default that of the joined world.
        rank: This rank; by default that of the joined world.
        shuffle: If false, samples come in the order of the dataset.
        seed: Seed of the permutation, the same on all ranks.
        drop_last: Leave out the epoch's last ``len(dataset) % num_replicas`` samples, so that ranks get equally many.

    Raises:
        DataError: If the rank is not within the world, or nothing would be left of an epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        world = current_world()
        self.num_replicas = world.world_size if num_replicas is None else num_replicas
        self.rank = world.rank if rank is None else rank
        check_rank(self.rank, self.num_replicas)
        self.permutation = GlobalPermutation(len(dataset), seed=seed, shuffle=shuffle)
        self.num_used = len(dataset) - len(dataset) % self.num_replicas if drop_last else len(dataset)
        if self.num_used == 0:
            raise DataError(
                f"drop_last=True leaves nothing of a dataset of {len(dataset)} samples on {self.num_replicas} ranks. "
                "Set drop_last=False, or use fewer ranks."
            )
        self.drop_last = drop_last
        self._epoch = 0
        self._position = 0

    @property
    def epoch(self) -> int:
        """Number of the current epoch."""
        return self._epoch

    def __len__(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        return len(range(self.rank, self.num_used, self.num_replicas))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; the cursor stays where it is if that is the current epoch already."""
        if epoch != self._epoch:
            self._epoch, self._position = int(epoch), 0

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's samples from the cursor to the end of the epoch."""
        return self._samples(self._epoch, self._position)

    def _samples(self, epoch: int, position: int) -> Iterator[int]:
        per_look = max(1, _LOOK_AHEAD // self.num_replicas) * self.num_replicas
        for begin in range(position, self.num_used, per_look):
            samples = self.permutation.indices(epoch, begin, min(begin + per_look, self.num_used))
            yield from samples[self.rank :: self.num_replicas].tolist()

    def commit(self, num_samples: int) -> None:
        """Move the cursor past ``num_samples`` samples of all ranks together, after the step that used them."""
        self._position = min(self._position + num_samples, self.num_used)

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as JSON-able values, free of rank and world size."""
        return {"epoch": self._epoch, "position": self._position, "permutation": repr(self.permutation)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved cursor, at this or another world size.

        Raises:
            DataError: If the state belongs to another dataset or seed.
        """
        if state["permutation"] != repr(self.permutation):
            raise DataError(
                f"The saved sampler has the permutation {state['permutation']}, but this run has {self.permutation!r}: "
                "the rest of the epoch would not be the rest of the saved one. "
                "Set it as it was, or start anew without resuming."
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
