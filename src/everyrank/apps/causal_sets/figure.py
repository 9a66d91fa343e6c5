"""The figure of a run: accuracy against size, who is taken for what, how true probabilities are, and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from everyrank.apps.causal_sets.comparison import Comparison, mean, standard_error
from everyrank.apps.causal_sets.tables import octaves
from everyrank.apps.causal_sets.task import HEADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {"dimension": "dimension", "curvature": "curvature", "manifold": "spacetime or not"}


def draw(path: Path, comparison: Comparison, training: Sequence[Mapping[str, float]]) -> None:
    """Write the figure as a PNG.

    Args:
        path: Where to write it.
        comparison: The answers on the test set.
        training: One mapping for each epoch with ``epoch`` (from 0), ``train_loss``, and if measured ``val_loss``.
    """
    # The object-oriented interface: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic("nc;pc;lc", width_ratios=[2, 3])
    _accuracy_by_size(axes["n"], comparison)
    _reliability(axes["p"], comparison)
    _losses(axes["l"], training)
    _confusion(axes["c"], comparison)
    figure.savefig(path, dpi=110)


def _losses(axes: Axes, training: Sequence[Mapping[str, float]]) -> None:
    for name, title in {"train_loss": "training", "val_loss": "validation"}.items():
        points = [(row["epoch"] + 1, row[name]) for row in training if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=title)
    axes.set(xlabel="epoch", ylabel="loss (sum of three cross-entropies)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _accuracy_by_size(axes: Axes, comparison: Comparison) -> None:
    """Draw each octave at its geometric middle, with one standard error."""
    everything = np.ones_like(comparison.sprinkled)
    contenders = [
        ("dimension: network", comparison.right("dimension"), comparison.sprinkled, "C0", "-"),
        ("dimension: Myrheim-Meyer", comparison.right("dimension", "myrheim_meyer"), comparison.sprinkled, "C1", "--"),
        ("dimension: midpoint scaling", comparison.right("dimension", "midpoint"), comparison.sprinkled, "C2", "--"),
        ("curvature: network", comparison.right("curvature"), comparison.sprinkled, "C3", "-"),
        ("spacetime or not: network", comparison.right("manifold"), everything, "C4", "-"),
    ]
    for title, right, asked, color, style in contenders:
        points = []
        for low, high in octaves(comparison.size):
            answers = right[asked & (comparison.size >= low) & (comparison.size < high)]
            if len(answers):
                error = standard_error(mean(answers), len(answers))
                points.append((np.sqrt(low * (high - 1)), 100 * mean(answers), 100 * float(error)))
        if points:
            x, y, bars = zip(*points, strict=True)
            axes.errorbar(x, y, bars, label=title, color=color, linestyle=style, marker="o", markersize=3, capsize=2)
    low, high = int(comparison.size.min()), int(comparison.size.max())
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(2, 13) if low <= 2**power <= high]
    axes.set_xticks(ticks or [low], [str(tick) for tick in ticks or [low]])
    axes.set(
        xlabel="number of elements n", ylabel="right answers (%)", xlim=(0.95 * low, 1.05 * high), ylim=(None, 101)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _reliability(axes: Axes, comparison: Comparison) -> None:
    axes.plot([0, 100], [0, 100], color="grey", linewidth=1)
    for question in HEADS if comparison.sprinkled.any() else HEADS[2:]:
        reliability, _ = comparison.reliability(question)
        error = standard_error(reliability.accuracy, reliability.count)
        x, y, bars = (100 * values for values in (reliability.confidence, reliability.accuracy, error))
        title = f"{_TITLES[question]}: error {100 * reliability.error:.1f} %"
        axes.errorbar(x, y, bars, label=title, marker="o", markersize=3, capsize=2)
    axes.set(
        xlabel="probability that the network gave its answer (%)",
        ylabel="right answers (%)",
        xlim=(20, 101),
        ylim=(20, 101),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _confusion(axes: Axes, comparison: Comparison) -> None:
    """Draw who is taken for what, in percent of each row."""
    truths, answers, counts = comparison.confusion()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            color = "white" if share > 50 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize="small")
    axes.set_xticks(range(len(answers)), answers, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(truths)), truths)
    axes.set(xlabel="answer", ylabel="truth", title="The network's whole answers, in percent of each kind")
