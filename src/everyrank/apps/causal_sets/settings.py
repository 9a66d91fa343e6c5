"""The settings of the causal-set data, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from everyrank import schema
from everyrank.apps.causal_sets.samples import Recipe


@schema.section
class DataSettings:
    """What data to draw."""

    num_samples: schema.Int = schema.field(
        default=4000, ge=1, doc="How many orders, over training, validation and test."
    )
    mean_size: schema.Float = schema.field(
        default=100.0, ge=8, le=4000, doc="Mean number of elements n of an order (Poisson)."
    )
    fixed_size: schema.Bool = schema.field(default=False, doc="Give every order exactly `mean_size` elements instead.")
    dimensions: list[schema.Int] = schema.field(
        factory=lambda: [2, 3, 4], min_length=1, doc="The spacetime dimensions to tell apart, each at least 2."
    )
    layered_fraction: schema.Float = schema.field(
        default=0.25,
        ge=0,
        le=1,
        doc="Share of Kleitman-Rothschild orders, which are like no spacetime, among the samples.",
    )
    seed: schema.Int = schema.field(default=0, ge=0, doc="Seed of the data; sample i depends on it and on i alone.")
    dtype: Literal["float32", "float64"] = schema.field(default="float32", doc="Floating-point type of the features.")

    def recipe(self) -> Recipe:
        """Return what determines each sample: neither how many are used, nor in which precision."""
        return Recipe(
            mean_size=float(self.mean_size),
            fixed_size=self.fixed_size,
            dimensions=tuple(self.dimensions),
            layered_fraction=float(self.layered_fraction),
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
    if len(set(settings.dimensions)) != len(settings.dimensions):
        problems.append(f"dimensions: found {settings.dimensions}, but each may be named once.")
    return problems
