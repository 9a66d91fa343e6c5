"""Other orders than a plain shuffle, to be given to ``GlobalBatchSampler(order=...)``.

All of them answer for any position on its own, and the same on every rank.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from everyrank.data.order import GlobalOrder, Indices, check_positions, hash_positions
from everyrank.errors import DataError

# Below this many positions, plain Python is faster than numpy.
_FEW = 8


class WeightedOrder:
    """Draws samples with replacement, each with a probability in proportion to its weight.

    Each position's draw is computed from the position by a hash; memory is one number for each weight.

    Args:
        weights: Weight of each sample, 0 or more; shape ``(num_samples_of_the_dataset,)``.
        num_samples: Number of draws an epoch; by default as many as there are weights.
        seed: Seed, the same on all ranks.

    Raises:
        DataError: If a weight is negative or not finite, or all are zero.
    """

    def __init__(self, weights: Sequence[float] | np.ndarray, num_samples: int | None = None, seed: int = 0) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise DataError(
                "The weights of a WeightedOrder must be one finite number of at least 0 for each sample, and not all "
                f"0; an array of shape {values.shape} was given. Look for NaN, negative and missing values."
            )
        self.num_samples = len(values) if num_samples is None else int(num_samples)
        self.seed = seed
        # cumsum adds one after the other, so that the sums are the same on every platform.
        self._ends = np.cumsum(values)
        self._last = int(np.flatnonzero(values)[-1])
        self._digest = hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"WeightedOrder(weights={self._digest}, num_samples={self.num_samples}, seed={self.seed})"

    def index(self, epoch: int, position: int) -> int:
        """Return the sample at one position."""
        return int(self.indices(epoch, position, position + 1)[0])

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the samples at positions ``start`` to ``stop`` - 1."""
        check_positions(self.num_samples, start, stop)
        numbers = hash_positions(f"weighted: seed {self.seed}, epoch {epoch}", start, stop)
        # The upper 53 bits as a double in [0, 1), times the sum of all weights.
        points = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53 * self._ends[-1]
        found = np.searchsorted(self._ends, points, side="right")
        return np.minimum(found, self._last).astype(np.int64)  # a product may round up to the very end


class MixtureOrder:
    """Mixes several datasets by ratio; indices are those of the datasets one after the other (``ConcatDataset``).

    The ratio holds exactly in every block of about a thousand positions, shuffled within. Each dataset goes through
    permutations of its own, one after the other, also across the mixture's epochs: none of its samples comes again
    before all others have come.

    Args:
        sizes: Number of samples of each dataset.
        ratios: Share of each dataset, in any unit; kept exactly if simple, else to within one in 16384.
        num_samples: Positions an epoch; by default as many as there are samples together.
        seed: Seed, the same on all ranks.

    Raises:
        DataError: If sizes and ratios do not fit together.
    """

    _RESOLUTION = 16384
    _BLOCK = 1024

    def __init__(
        self, sizes: Sequence[int], ratios: Sequence[float], num_samples: int | None = None, seed: int = 0
    ) -> None:
        if len(sizes) != len(ratios) or not sizes or min(sizes) < 1 or not all(0 < r < math.inf for r in ratios):
            raise DataError(
                f"sizes={list(sizes)} and ratios={list(ratios)} were given for a mixture; each dataset needs at least "
                "one sample and one ratio greater than 0. Leave out datasets that are not to be used."
            )
        self.num_samples = sum(sizes) if num_samples is None else int(num_samples)
        self.seed = seed
        self._sizes = tuple(sizes)
        self._orders = [GlobalOrder(size, seed=_derive(seed, f"dataset {i}")) for i, size in enumerate(sizes)]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self._counts = _whole_counts(ratios, self._RESOLUTION)
        repeats = max(1, self._BLOCK // sum(self._counts))
        self._counts = [count * repeats for count in self._counts]
        self._ends = [sum(self._counts[: i + 1]) for i in range(len(sizes))]
        self._block_order = GlobalOrder(self._ends[-1], seed=_derive(seed, "blocks"))

    def __repr__(self) -> str:
        return (
            f"MixtureOrder(sizes={self._sizes}, counts={tuple(self._counts)}, num_samples={self.num_samples}, "
            f"seed={self.seed})"
        )

    def index(self, epoch: int, position: int) -> int:
        """Return the sample at one position; ``epoch`` counts from 0."""
        check_positions(self.num_samples, position, position + 1)
        block, inside = divmod(epoch * self.num_samples + position, self._ends[-1])
        slot = self._block_order.index(block, inside)
        which = bisect_right(self._ends, slot)
        count = self._counts[which]
        number = block * count + slot - (self._ends[which] - count)  # of this dataset's samples, since the beginning
        passes, place = divmod(number, self._sizes[which])
        return self._offsets[which] + self._orders[which].index(passes, place)

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the samples at positions ``start`` to ``stop`` - 1; ``epoch`` counts from 0."""
        check_positions(self.num_samples, start, stop)
        begin, end = epoch * self.num_samples + start, epoch * self.num_samples + stop
        size = self._ends[-1]
        parts = [
            self._block_indices(block, max(begin - block * size, 0), min(end - block * size, size))
            for block in range(begin // size, -(-end // size))
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _block_indices(self, block: int, start: int, stop: int) -> Indices:
        slots = self._block_order.indices(block, start, stop)
        out = np.empty(stop - start, dtype=np.int64)
        for which, count in enumerate(self._counts):
            first_slot = self._ends[which] - count
            mine = (slots >= first_slot) & (slots < first_slot + count)
            if mine.any():
                samples = self._pass_through(which, block * count, (block + 1) * count)
                out[mine] = self._offsets[which] + samples[slots[mine] - first_slot]
        return out

    def _pass_through(self, which: int, start: int, stop: int) -> Indices:
        """Return a dataset's samples number ``start`` to ``stop`` - 1, counted over all its permutations."""
        size, parts = self._sizes[which], []
        while start < stop:
            passes, place = divmod(start, size)
            num = min(size - place, stop - start)
            order = self._orders[which]
            if num < _FEW:
                parts.append(np.array([order.index(passes, place + i) for i in range(num)], dtype=np.int64))
            else:
                parts.append(order.indices(passes, place, place + num))
            start += num
        return np.concatenate(parts)


class BlockOrder:
    """A shuffle for data whose random access is slow: neighbours in storage stay close in time.

    Blocks of consecutive samples are shuffled, and then the samples within each window of several shuffled blocks. A
    reader that holds one window's blocks reads every block once an epoch. Where the blocks begin changes from epoch to
    epoch, so that the samples left over by whole blocks, which come last, are not always the same.

    Args:
        num_samples: Number of samples.
        block_size: Number of consecutive samples in a block.
        num_window_blocks: Number of blocks in a window.
        seed: Seed, the same on all ranks.

    Raises:
        DataError: If a number is out of range.
    """

    def __init__(self, num_samples: int, block_size: int, num_window_blocks: int = 16, seed: int = 0) -> None:
        if block_size < 1 or num_window_blocks < 1:
            raise DataError(
                f"block_size={block_size} and num_window_blocks={num_window_blocks} were given for a BlockOrder; both "
                "must be at least 1. For example 1024 samples that lie together, and 16 blocks held in memory."
            )
        self.num_samples = GlobalOrder(num_samples).num_samples
        self.seed = seed
        self._block_size = min(block_size, num_samples)
        self._num_blocks = num_samples // self._block_size
        self._window_blocks = min(num_window_blocks, self._num_blocks)
        self._window = self._window_blocks * self._block_size
        self._num_windows = -(-num_samples // self._window)
        self._blocks = GlobalOrder(self._num_blocks, seed=_derive(seed, "blocks"))

    def __repr__(self) -> str:
        return (
            f"BlockOrder(num_samples={self.num_samples}, block_size={self._block_size}, "
            f"num_window_blocks={self._window_blocks}, seed={self.seed})"
        )

    def index(self, epoch: int, position: int) -> int:
        """Return the sample at one position."""
        return int(self.indices(epoch, position, position + 1)[0])

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the samples at positions ``start`` to ``stop`` - 1."""
        check_positions(self.num_samples, start, stop)
        out = np.empty(stop - start, dtype=np.int64)
        shift = _derive(self.seed, f"shift of epoch {epoch}") % self.num_samples
        while start < stop:
            window, inside = divmod(start, self._window)
            begin = window * self._window
            size = min(self._window, self.num_samples - begin)
            num = min(size - inside, stop - start)
            order = GlobalOrder(size, seed=_derive(self.seed, f"window {window}"))
            places = begin + order.indices(epoch, inside, inside + num)
            block, offset = np.divmod(places, self._block_size)
            first = window * self._window_blocks
            ids = self._blocks.indices(epoch, first, min(first + self._window_blocks, self._num_blocks))
            ids = np.append(ids, self._num_blocks)  # the samples left over stand after all blocks
            samples = ids[block - first] * self._block_size + offset
            out[len(out) - (stop - start) :][:num] = (samples + shift) % self.num_samples
            start += num
        return out


class ConcatenatedDataset(Dataset):
    """Several datasets one after the other, as ``MixtureOrder`` numbers them."""

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = list(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets]).tolist()

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each dataset."""
        return [len(dataset) for dataset in self.datasets]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        which = bisect_right(self._ends, index)
        return self.datasets[which][index - (self._ends[which - 1] if which else 0)]

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to every dataset that wants to know."""
        for dataset in self.datasets:
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)


def _whole_counts(ratios: Sequence[float], resolution: int) -> list[int]:
    """Return the smallest whole numbers in these ratios, or the nearest ones that add up to ``resolution``."""
    exact = [_simple_fraction(ratio) for ratio in ratios]
    common = math.lcm(*(ratio.denominator for ratio in exact))
    counts = [int(ratio * common) for ratio in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    if sum(counts) <= resolution:
        return counts
    total = sum(exact)
    return [max(1, round(ratio / total * resolution)) for ratio in exact]


def _simple_fraction(value: float) -> Fraction:
    """Return the fraction that was meant: a third for 0.3333333333333333."""
    simple = Fraction(value).limit_denominator(1000)
    return simple if abs(simple - Fraction(value)) <= 1e-12 * value else Fraction(value)


def _derive(seed: int, purpose: str) -> int:
    """Return a seed for one purpose, unrelated to those for others."""
    return int.from_bytes(hashlib.blake2b(f"{seed}: {purpose}".encode(), digest_size=8).digest(), "little")
