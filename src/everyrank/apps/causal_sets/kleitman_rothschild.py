"""Kleitman-Rothschild orders: what almost every large partial order looks like, and no spacetime does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def layer_sizes(size: int) -> tuple[int, int, int]:
    """Return the sizes of the bottom, middle and top layer: n/4, n/2, n/4, the middle taking what does not divide."""
    outer = size // 4
    return outer, size - 2 * outer, outer


def sample_order(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Draw a three-layer order as in Kleitman & Rothschild 1975 (Trans. Amer. Math. Soc. 205, 205).

    Elements of adjacent layers are related with probability 1/2, independently; the transitive closure then relates
    a bottom element to a top one wherever some middle element lies between them.

    Args:
        rng: The source of randomness.
        size: Number of elements n.

    Returns:
        Boolean matrix [n, n], strictly upper triangular (bottom layer first); entry (i, j) says that i precedes j.
    """
    bottom, middle, top = layer_sizes(size)
    lower = rng.random((bottom, middle)) < 0.5
    upper = rng.random((middle, top)) < 0.5
    causal = np.zeros((size, size), dtype=bool)
    causal[:bottom, bottom : bottom + middle] = lower
    causal[bottom : bottom + middle, bottom + middle :] = upper
    causal[:bottom, bottom + middle :] = (lower.astype(np.float32) @ upper.astype(np.float32)) > 0
    return causal


def expected_ordering_fraction(size: int) -> float:
    """Return the exact mean ordering fraction of :func:`sample_order` at n elements; 3/8 as n grows.

    A bottom and a top element are unrelated only if none of the b middle elements lies between them, which has
    probability (3/4)^b; so ``E[R] = b (a + c) / 2 + a c (1 - (3/4)^b)`` for layers a, b, c.
    """
    bottom, middle, top = layer_sizes(size)
    relations = middle * (bottom + top) / 2 + bottom * top * (1 - 0.75**middle)
    return 2 * relations / (size * (size - 1)) if size > 1 else 0.0
