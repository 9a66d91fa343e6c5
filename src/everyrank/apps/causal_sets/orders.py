"""What can be read off a partial order given as a causal matrix [n, n]: entry (i, j) says that i precedes j.

The counts go through float32 matrix products, which are exact up to 2^24 and many times faster than products of
integers or booleans in numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Causal = NDArray[np.bool_]


def interval_sizes(causal: Causal) -> NDArray[np.float32]:
    """Return the matrix [n, n] of how many elements lie strictly between i and j (0 where i does not precede j)."""
    numbers = causal.astype(np.float32)
    return numbers @ numbers


def link_matrix(causal: Causal) -> Causal:
    """Return the links [n, n]: the relations with nothing between them, i.e. the transitive reduction."""
    return causal & (interval_sizes(causal) == 0)


def transitive_closure(relation: Causal) -> Causal:
    """Return the smallest transitive relation [n, n] that contains ``relation``, by repeated squaring."""
    closed = relation.copy()
    while True:
        grown = closed | (interval_sizes(closed) > 0)
        if np.array_equal(grown, closed):
            return closed
        closed = grown


def heights(causal: Causal) -> NDArray[np.int64]:
    """Return for each element [n] the length of the longest chain that ends in it; 1 for a minimal element.

    Minimal elements are peeled off layer by layer, so the cost is one vector operation per layer.
    """
    height = np.zeros(len(causal), dtype=np.int64)
    waiting = causal.sum(axis=0)
    layer = 0
    while True:
        minimal = (waiting == 0) & (height == 0)
        if not minimal.any():
            return height
        layer += 1
        height[minimal] = layer
        waiting = waiting - causal[minimal].sum(axis=0)
