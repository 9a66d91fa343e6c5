"""The settings of the causal-set data, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from everyrank import schema
from everyrank.apps.causal_sets.samples import OTHERS, SPACETIMES, Recipe


@schema.section
class DataSettings:
    """What data to draw."""

    num_samples: schema.Int = schema.field(
        default=8000, ge=1, doc="How many orders, over training, validation and test."
    )
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
    dtype: Literal["float32", "float64"] = schema.field(default="float32", doc="Floating-point type of the features.")

    def recipe(self) -> Recipe:
        """Return what determines each sample: neither how many are used, nor in which precision."""
        return Recipe(
            min_size=self.min_size,
            max_size=self.max_size,
            dimensions=tuple(self.dimensions),
            spacetimes=tuple(self.spacetimes),
            duration=float(self.duration),
            others=tuple(self.others),
            others_fraction=float(self.others_fraction),
            seed=self.seed,
        )


def read_settings(settings: Mapping[str, Any]) -> DataSettings:
    """Check settings against :class:`DataSettings`.

    Raises:
        ConfigError: With every mistake at once: the key, what was found, what is allowed, and the nearest name.
    """
    return schema.build(DataSettings, settings, what="data of the causal sets (app.data.kwargs)", checks=_check)


def _check(settings: DataSettings) -> list[str]:
    wrong = [dimension for dimension in settings.dimensions if not 2 <= dimension <= 8]
    problems = [f"dimensions: found {dimension}, but it must be between 2 and 8." for dimension in wrong]
    if settings.max_size < settings.min_size:
        problems.append(f"max_size: found {settings.max_size}, but min_size is {settings.min_size}.")
    for name, values in (
        ("dimensions", settings.dimensions),
        ("spacetimes", settings.spacetimes),
        ("others", settings.others),
    ):
        if len(set(values)) != len(values):
            problems.append(f"{name}: found {values}, but each may be named once.")
    return problems
