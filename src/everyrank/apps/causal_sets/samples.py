"""Sample i of the data set: an order drawn from (seed, i) alone, and what a network may see of it.

A network never sees coordinates: only what can be counted in the order itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from everyrank import schema
from everyrank.apps.causal_sets import constant_curvature, minkowski, nonmanifold, orders

GENERATOR_VERSION = 2
"""Part of the cache's key: raise it whenever the same settings would give other samples."""

COUNTS = ("past", "future", "links_in", "links_out", "height", "depth")
"""What is counted for each element: the sizes of its past and future, its links from below and above, and the longest
chains that end and begin in it."""

SPACETIMES = {"anti_de_sitter": -1, "minkowski": 0, "de_sitter": 1}
"""Kinds of spacetime, with the sign of their curvature."""

OTHERS = ("kleitman_rothschild", "layered", "percolation", "product", "quotient")
"""Kinds of order that are no sprinkling."""

KINDS = (*SPACETIMES, *OTHERS)
"""All kinds; a sample holds the index."""

NO_DIMENSION = 0
"""Stands in for the dimension of an order that is no sprinkling."""


@schema.section
class Recipe:
    """What determines sample i, besides i."""

    min_size: schema.Int = schema.field(default=16, ge=4, le=4000, doc="Smallest number of elements n of an order.")
    max_size: schema.Int = schema.field(
        default=128, ge=4, le=4000, doc="Largest number of elements; each octave of n is equally likely."
    )
    dimensions: list[schema.Int] = schema.field(
        factory=lambda: [2, 3, 4, 5], min_length=1, doc="The spacetime dimensions to tell apart, each at least 2."
    )
    spacetimes: list[Literal["minkowski", "de_sitter", "anti_de_sitter"]] = schema.field(
        factory=lambda: list(SPACETIMES), min_length=1, doc="The spacetimes to sprinkle into, equally likely."
    )
    duration: schema.Float = schema.field(
        default=2.0,
        gt=0,
        le=3,
        doc="Proper time between the tips of a curved diamond, in radii of curvature (anti-de Sitter has room for pi).",
    )
    others: list[Literal["kleitman_rothschild", "layered", "percolation", "product", "quotient"]] = schema.field(
        factory=lambda: list(OTHERS), min_length=1, doc="The orders that are like no spacetime, equally likely."
    )
    others_fraction: schema.Float = schema.field(default=0.4, ge=0, le=1, doc="Their share of the samples.")
    seed: schema.Int = schema.field(default=0, ge=0, doc="Seed of the data; sample i depends on it and on i alone.")


@dataclass(frozen=True)
class Sample:
    """One order, reduced to what is kept.

    Attributes:
        counts: int16 [n, len(COUNTS)], the columns of ``COUNTS``.
        links: int16 [2, num_links], lower and upper element of each link.
        kind: Index into ``KINDS``.
        dimension: The spacetime dimension, or ``NO_DIMENSION``.
        num_relations: Number R of related pairs.
    """

    counts: NDArray[np.int16]
    links: NDArray[np.int16]
    kind: int
    dimension: int
    num_relations: int


def draw_sample(recipe: Recipe, index: int) -> Sample:
    """Draw sample ``index``: a pure function of the recipe and the index, on every rank and in every run."""
    rng = np.random.default_rng([recipe.seed, index])
    is_other = rng.random() < recipe.others_fraction
    dimension = int(rng.choice(recipe.dimensions))
    kind = str(rng.choice(recipe.others if is_other else recipe.spacetimes))
    size = _draw_size(rng, recipe)
    if is_other:
        return describe(draw_other(rng, kind, size, dimension), kind, NO_DIMENSION)
    a = constant_curvature.strength(recipe.duration, SPACETIMES[kind])
    return describe(draw_spacetime(rng, dimension, size, a), kind, dimension)


def draw_spacetime(rng: np.random.Generator, dimension: int, size: int, a: float) -> NDArray[np.bool_]:
    """Draw the order [n, n] of a sprinkling into a diamond of constant curvature; ``a`` = 0 is Minkowski space."""
    return minkowski.causal_matrix(constant_curvature.sprinkle(rng, dimension, size, a))


def draw_other(rng: np.random.Generator, kind: str, size: int, dimension: int) -> NDArray[np.bool_]:
    """Draw an order [n, n] of one of ``OTHERS``.

    Their free parameters are such that their ordering fractions are those of sprinklings of 2 to 5 dimensions.

    Args:
        rng: The source of randomness.
        kind: A name in ``OTHERS``.
        size: Number of elements n.
        dimension: Of the Minkowski space whose quotient is taken. The quotient identifies n/10 pairs.
    """
    if kind == "kleitman_rothschild":
        return nonmanifold.kleitman_rothschild(rng, size)
    if kind == "layered":
        return nonmanifold.random_layers(rng, size)
    if kind == "percolation":
        return nonmanifold.percolation(rng, size, math.exp(rng.uniform(0.0, math.log(6.0))) / size)
    if kind == "product":
        return nonmanifold.product(rng, size, num_orders=int(rng.integers(3, 6)))
    num_pairs = max(1, round(size / 10))
    return nonmanifold.quotient(rng, draw_spacetime(rng, dimension, size + num_pairs, 0.0), num_pairs)


def describe(causal: NDArray[np.bool_], kind: str, dimension: int) -> Sample:
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
        kind=KINDS.index(kind),
        dimension=dimension,
        num_relations=int(causal.sum()),
    )


def _draw_size(rng: np.random.Generator, recipe: Recipe) -> int:
    """Draw n, each octave equally likely."""
    low, high = math.log(recipe.min_size), math.log(recipe.max_size + 1)
    return min(int(math.exp(rng.uniform(low, high))), recipe.max_size)
