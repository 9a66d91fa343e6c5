"""The settings of the causal-set data, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from everyrank import schema
from everyrank.apps.causal_sets.samples import Recipe


@schema.section
class DataSettings(Recipe):
    """What data to draw: the recipe of each sample, how many are used, and in which precision."""

    num_samples: schema.Int = schema.field(
        default=8000, ge=1, doc="How many orders, over training, validation and test."
    )
    dtype: Literal["float32", "float64"] = schema.field(default="float32", doc="Floating-point type of the features.")


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
