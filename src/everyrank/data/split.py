"""Splits of a dataset, by pure functions: all ranks get the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from everyrank.data.permutation import GlobalPermutation, Indices
from everyrank.data.randomness import fetch
from everyrank.errors import DataError

# Training epochs count from 0, so no epoch's order ever coincides with the one that splits.
_SPLIT_EPOCH = -1


def split_sizes(num_samples: int, fractions: Sequence[float]) -> list[int]:
    """Return how many samples each part gets: its share rounded down, the rest to the largest remainders.

    Equal remainders go to the earlier part. For 103 samples and 0.8, 0.1, 0.1 the shares are 82.4, 10.3 and 10.3, which
    makes 83, 10 and 10.

    Args:
        num_samples: Number of samples.
        fractions: Each 0 or more, together 1.

    Raises:
        DataError: If the fractions do not make 1.
    """
    if not fractions or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(
            f"The fractions {list(fractions)} were given for a split; each must be at least 0 and together they must "
            f"make 1, but they make {sum(fractions):g}. For example [0.8, 0.1, 0.1]."
        )
    exact = [Fraction(str(fraction)) for fraction in fractions]  # 0.1 means a tenth, not its nearest double
    shares = [num_samples * fraction / sum(exact) for fraction in exact]
    sizes = [int(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda part: sizes[part] - shares[part])
    for part in by_remainder[: num_samples - sum(sizes)]:
        sizes[part] += 1
    return sizes


def split_indices(num_samples: int, fractions: Sequence[float], seed: int = 0) -> list[Indices]:
    """Split ``0 .. num_samples - 1`` at random into disjoint parts that together hold every sample.

    The result depends on the arguments alone, not on the rank, the world size or the platform.

    Args:
        num_samples: Number of samples.
        fractions: Share of each part; see ``split_sizes`` for the exact sizes.
        seed: Seed of the split.

    Returns:
        One int64 array a part, ascending. A part may be empty.

    Raises:
        DataError: If the fractions do not make 1, or there are no samples.
    """
    sizes = split_sizes(num_samples, fractions)
    order = GlobalPermutation(num_samples, seed=seed).indices(_SPLIT_EPOCH, 0, num_samples)
    ends = np.cumsum(sizes)
    return [np.sort(order[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


class View(Dataset):
    """Some samples of a dataset, in a given order, fetched in whole batches where the dataset can.

    Args:
        dataset: The dataset.
        indices: Which of its samples, shape ``(num_samples,)``.
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | Indices) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the samples at ``indices`` as a list."""
        return fetch(self.dataset, self.indices[indices].tolist())


def split_dataset(dataset: Any, fractions: Sequence[float], seed: int = 0) -> list[View]:
    """Split a dataset at random into views of disjoint samples; see ``split_indices``."""
    return [View(dataset, indices) for indices in split_indices(len(dataset), fractions, seed)]
