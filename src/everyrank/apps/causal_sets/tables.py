"""The tables of a run: right answers by question, by kind and by number of elements, and how true probabilities are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from everyrank.apps.causal_sets.comparison import KIND_TITLES, Comparison, mean, standard_error
from everyrank.apps.causal_sets.samples import OTHERS, SPACETIMES
from everyrank.apps.causal_sets.task import HEADS

if TYPE_CHECKING:
    from rich.table import Table

_NUM_CONFUSIONS = 5


def make_tables(comparison: Comparison) -> list[Table]:
    """Lay out the accuracies, with their statistical errors, for the terminal."""
    tables = [_by_question(comparison), _by_size(comparison), _confusions(comparison)]
    return [*tables, _calibration(comparison)] if comparison.sprinkled.any() else tables[:1]


def octaves(size: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges ``low <= n < high`` that hold all sizes: octaves from the smallest, the last one taking the rest."""
    low, largest = int(size.min()), int(size.max())
    while low <= largest:
        high = 2 * low if 4 * low <= largest + 1 else largest + 1
        yield low, high
        low = high


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", min_width=len(title))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _by_question(comparison: Comparison) -> Table:
    sprinkled = comparison.sprinkled
    low, high = comparison.size.min(), comparison.size.max()
    title = f"Test accuracy in % on {len(sprinkled):,} orders of {low} to {high} elements"
    table = _table(title, "", "orders", "network", "Myrheim-Meyer", "midpoint")
    names = ", ".join(map(str, comparison.dimensions))
    spacetimes = [(KIND_TITLES[name], comparison.is_kind(name)) for name in SPACETIMES]
    right = comparison.right("dimension")
    estimated = [comparison.right("dimension", who) for who in ("myrheim_meyer", "midpoint")]
    for title, asked in ((f"dimension ({names})", sprinkled), *((f"  {name}", rows) for name, rows in spacetimes)):
        table.add_row(title, f"{asked.sum():,}", _percent(right[asked]), *(_percent(it[asked]) for it in estimated))
    right = comparison.right("curvature")
    for title, asked in (("curvature (-, 0, +)", sprinkled), *((f"  {name}", rows) for name, rows in spacetimes)):
        table.add_row(title, f"{asked.sum():,}", _percent(right[asked]), "", "")
    right = comparison.right("manifold")
    table.add_row("spacetime or not", f"{len(right):,}", _percent(right), "", "")
    others = [(KIND_TITLES[name], comparison.is_kind(name)) for name in OTHERS]
    for title, asked in (("sprinklings", sprinkled), *others):
        table.add_row(f"  {title}", f"{asked.sum():,}", _percent(right[asked]), "", "")
    return table


def _by_size(comparison: Comparison) -> Table:
    columns = ("dimension", "Myrheim-Meyer", "midpoint", "curvature", "spacetime?")
    table = _table("By number of elements", "elements", *columns)
    sprinkled = comparison.sprinkled
    for low, high in octaves(comparison.size):
        inside = (comparison.size >= low) & (comparison.size < high)
        asked = inside & sprinkled
        table.add_row(
            f"{low}-{high - 1}",
            *(_percent(comparison.right("dimension", who)[asked]) for who in ("network", "myrheim_meyer", "midpoint")),
            _percent(comparison.right("curvature")[asked]),
            _percent(comparison.right("manifold")[inside]),
        )
    return table


def _confusions(comparison: Comparison) -> Table:
    """The mistakes that are made most often, as shares of the true kind."""
    truths, answers, counts = comparison.confusion()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = shares.copy()
    for row, truth in enumerate(truths):
        wrong[row, answers.index(truth) if truth in answers else -1] = 0
    table = _table("Where the network fails most", "truth", "is taken for", "of its orders")
    for place in np.argsort(-wrong, axis=None, kind="stable")[:_NUM_CONFUSIONS]:
        row, column = np.unravel_index(place, wrong.shape)
        if wrong[row, column] > 0:
            table.add_row(truths[row], answers[column], f"{100 * wrong[row, column]:.0f} % of {counts[row].sum():,}")
    return table


def _calibration(comparison: Comparison) -> Table:
    table = _table("Are the network's probabilities true?", "", "calibration error", "if all were true")
    for question in HEADS:
        reliability, (expected, deviation) = comparison.reliability(question)
        title = "spacetime or not" if question == "manifold" else question
        table.add_row(title, f"{100 * reliability.error:.2f} %", f"{100 * expected:.2f} ± {100 * deviation:.2f} %")
    return table


def _percent(right: NDArray[np.bool_]) -> str:
    """Write a share and its error in percent."""
    return f"{100 * mean(right):.1f} ± {100 * standard_error(mean(right), len(right)):.1f}" if len(right) else "-"
