"""The figure of a run: its curves, and who mistakes what for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from everyrank.apps.causal_sets.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, comparison: Comparison, training: Sequence[Mapping[str, float]]) -> None:
    """Write the figure as a PNG.

    Args:
        path: Where to write it.
        comparison: The answers on the test set.
        training: One mapping for each epoch with ``epoch`` (from 0), ``train_loss``, and if measured ``val_loss`` and
            ``val_accuracy``.
    """
    # The object-oriented interface: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _curves(axes[0, 0], training, {"train_loss": "training", "val_loss": "validation"}, "loss")
    axes[0, 0].set_yscale("log")
    _curves(axes[0, 1], training, {"val_accuracy": "validation"}, "accuracy (dimension and manifold-likeness)")
    summary = comparison.summary()
    kinds = [*(f"d = {dimension}" for dimension in comparison.dimensions), "layered"]
    network, estimator = comparison.confusion(comparison.network_answers), comparison.confusion(comparison.estimator)
    _matrix(axes[1, 0], network, kinds, f"network: {100 * summary['dimension_accuracy']:.2f} % of dimensions")
    share = 100 * summary["dimension_accuracy_myrheim_meyer"]
    _matrix(axes[1, 1], estimator, kinds, f"Myrheim-Meyer: {share:.2f} % of dimensions")
    figure.savefig(path, dpi=130)


def _curves(axes: Axes, training: Sequence[Mapping[str, float]], names: Mapping[str, str], label: str) -> None:
    for name, title in names.items():
        points = [(row["epoch"] + 1, row[name]) for row in training if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=title)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def _matrix(axes: Axes, counts: NDArray[np.int64], kinds: Sequence[str], title: str) -> None:
    """Draw a confusion matrix, coloured by the share of each row."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(
            column, row, f"{count:,}", ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black"
        )
    axes.set_xticks(range(len(kinds)), [*kinds[:-1], "none"])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="answer", ylabel="truth", title=title)
