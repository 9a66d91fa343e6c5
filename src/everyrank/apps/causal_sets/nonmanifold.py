"""Partial orders that are like no spacetime, from the commonest of all to some that come near to one.

Each function returns a boolean matrix [n, n]; entry (i, j) says that i precedes j.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from everyrank.apps.causal_sets.orders import transitive_closure

Causal = NDArray[np.bool_]


def layered(rng: np.random.Generator, sizes: Sequence[int], probability: float) -> Causal:
    """Draw a k-layer order: elements of adjacent layers are related by independent coins, and what follows from that.

    Such orders outnumber those that resemble spacetimes, and the gravitational action has to suppress them (Dhar 1978,
    J. Math. Phys. 19, 1711; Loomis & Carlip 2018, arXiv:1709.00064; Carlip, Carlip & Surya 2023, arXiv:2209.00327).

    Args:
        rng: The source of randomness.
        sizes: Number of elements of each layer, lowest first.
        probability: That an element precedes one of the next layer.
    """
    layer = np.repeat(np.arange(len(sizes)), sizes)
    adjacent = layer[None, :] == layer[:, None] + 1
    return transitive_closure(adjacent & (rng.random(adjacent.shape) < probability))


def kleitman_rothschild(rng: np.random.Generator, size: int) -> Causal:
    """Draw three layers of n/4, n/2 and n/4 elements with fair coins: what almost every large order looks like.

    Kleitman & Rothschild 1975, Trans. Amer. Math. Soc. 205, 205.
    """
    outer = size // 4
    return layered(rng, (outer, size - 2 * outer, outer), 0.5)


def random_layers(rng: np.random.Generator, size: int) -> Causal:
    """Draw a k-layer order: 2 to 6 layers of random sizes, none empty, with a probability between 0.1 and 0.9."""
    num_layers = min(int(rng.integers(2, 7)), size)
    borders = np.sort(rng.choice(np.arange(1, size), num_layers - 1, replace=False))
    return layered(rng, np.diff(borders, prepend=0, append=size).tolist(), rng.uniform(0.1, 0.9))


def percolation(rng: np.random.Generator, size: int, probability: float) -> Causal:
    """Draw by transitive percolation: each element is born above each earlier one with a probability, independently.

    The simplest of the classical growth dynamics (Rideout & Sorkin 2000, PRD 61, 024002, arXiv:gr-qc/9904062).
    """
    return transitive_closure(np.triu(rng.random((size, size)) < probability, k=1))


def product(rng: np.random.Generator, size: int, num_orders: int) -> Causal:
    """Draw the intersection of linear orders drawn at random: points of a cube, compared coordinate by coordinate.

    Winkler 1985, Order 1, 317. Two linear orders give Minkowski space of two dimensions in light-cone coordinates. More
    give "light cones" with edges, which no Lorentzian metric has. The mean ordering fraction is ``2^(1 - num_orders)``.
    """
    points = rng.random((size, num_orders))
    return np.logical_and.reduce(points[:, None, :] < points[None, :, :], axis=2)


def quotient(rng: np.random.Generator, causal: Causal, num_pairs: int) -> Causal:
    """Identify pairs of unrelated elements, one after the other: a spacetime with points glued together.

    Two unrelated elements can always be made one: the smallest order that agrees with the given one puts everything
    below either of them below everything above either. Only where no unrelated pair is left does it stop earlier.

    Args:
        rng: The source of randomness.
        causal: The order [n, n] to take the quotient of.
        num_pairs: How many pairs are identified; each makes the order one element smaller.
    """
    causal = causal.copy()
    for _ in range(num_pairs):
        unrelated = np.argwhere(np.triu(~(causal | causal.T), k=1))
        if not len(unrelated):
            break
        kept, gone = unrelated[rng.integers(len(unrelated))]
        below, above = causal[:, kept] | causal[:, gone], causal[kept] | causal[gone]
        causal |= below[:, None] & above[None, :]
        causal[:, kept], causal[kept] = below, above
        causal = np.delete(np.delete(causal, gone, axis=0), gone, axis=1)
    return causal
