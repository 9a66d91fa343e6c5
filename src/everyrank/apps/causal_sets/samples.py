"""Sample i of the data set: an order drawn from (seed, i) alone, and what a network may see of it.

A network never sees coordinates: only what can be counted in the order itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from everyrank.apps.causal_sets import kleitman_rothschild, minkowski, orders

GENERATOR_VERSION = 1
"""Part of the cache's key: raise it whenever the same settings would give other samples."""

COUNTS = ("past", "future", "links_in", "links_out", "height", "depth")
"""What is counted for each element: the sizes of its past and future, its links from below and above, and the longest
chains that end and begin in it."""

LAYERED = 0
"""Stands in for the dimension of an order that is no sprinkling (Kleitman-Rothschild)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What determines sample i, besides i.

    Attributes:
        mean_size: Mean number of elements n; n itself is Poisson, conditioned on at least 2.
        fixed_size: Whether every order has exactly ``mean_size`` elements instead.
        dimensions: Spacetime dimensions of the sprinklings, equally likely.
        layered_fraction: Probability that a sample is a Kleitman-Rothschild order instead of a sprinkling.
        seed: Seed of the whole data set.
    """

    mean_size: float
    fixed_size: bool
    dimensions: tuple[int, ...]
    layered_fraction: float
    seed: int


@dataclass(frozen=True)
class Sample:
    """One order, reduced to what is kept.

    Attributes:
        counts: int16 [n, len(COUNTS)], the columns of ``COUNTS``.
        links: int16 [2, num_links], lower and upper element of each link.
        dimension: The spacetime dimension, or ``LAYERED``.
        num_relations: Number R of related pairs.
    """

    counts: NDArray[np.int16]
    links: NDArray[np.int16]
    dimension: int
    num_relations: int


def draw_sample(recipe: Recipe, index: int) -> Sample:
    """Draw sample ``index``: a pure function of the recipe and the index, on every rank and in every run."""
    rng = np.random.default_rng([recipe.seed, index])
    layered = rng.random() < recipe.layered_fraction
    dimension = LAYERED if layered else int(rng.choice(recipe.dimensions))
    size = _draw_size(rng, recipe)
    if layered:
        causal = kleitman_rothschild.sample_order(rng, size)
    else:
        causal = minkowski.causal_matrix(minkowski.sprinkle(rng, dimension, size=size))
    return describe(causal, dimension)


def describe(causal: NDArray[np.bool_], dimension: int) -> Sample:
    """Count what ``COUNTS`` names in a causal matrix [n, n] and list its links."""
    links = orders.link_matrix(causal)
    counts = np.stack(
        [
            causal.sum(axis=0),
            causal.sum(axis=1),
            links.sum(axis=0),
            links.sum(axis=1),
            orders.heights(causal),
            orders.heights(causal.T),
        ],
        axis=1,
    )
    return Sample(
        counts=counts.astype(np.int16),
        links=np.stack(np.nonzero(links)).astype(np.int16),
        dimension=dimension,
        num_relations=int(causal.sum()),
    )


def _draw_size(rng: np.random.Generator, recipe: Recipe) -> int:
    """Draw n; fewer than two elements have no order to learn from, so those rare draws are repeated."""
    if recipe.fixed_size:
        return round(recipe.mean_size)
    while (size := int(rng.poisson(recipe.mean_size))) < 2:
        pass
    return size
