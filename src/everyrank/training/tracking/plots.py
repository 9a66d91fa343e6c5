"""The figure of a run: loss curves, and one panel for each further metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everyrank.training.tracking.history import column, read_history

_PLAIN = ("val_loss", "val_loss_std", "val_num_samples")


def draw_curves(history: Path, figure: Path) -> bool:
    """Draw ``curves.png`` from a history file.

    Args:
        history: ``history.jsonl``.
        figure: Where to write the figure.

    Returns:
        False if matplotlib is not installed or there is nothing to draw.
    """
    rows = read_history(history) if history.exists() else []
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not rows:
        return False
    epochs = [row for row in rows if row["kind"] in ("epoch", "validation")]
    metrics = sorted({key for row in epochs for key in row if key.startswith("val_") and key not in _PLAIN})
    # The object interface: pyplot would choose a backend for the whole process.
    canvas = Figure(figsize=(7.0, 3.2 * (1 + len(metrics))), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(1 + len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    _draw_losses(axes[0], [row for row in rows if row["kind"] == "step"], epochs)
    for axis, name in zip(axes[1:], metrics, strict=True):
        axis.plot(*column(epochs, name), marker="o", markersize=3, color="tab:orange")
        axis.set_ylabel(name.removeprefix("val_"))
        axis.set_ylim(*_padded(column(epochs, name)[1]))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("optimizer step")
    canvas.savefig(figure, dpi=130)
    return True


def _draw_losses(axis: Any, steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> None:
    axis.plot(*column(steps, "loss"), color="tab:blue", alpha=0.25, linewidth=1, label="training, each step")
    axis.plot(*column(epochs, "train_loss"), color="tab:blue", marker="o", markersize=3, label="training, epoch mean")
    where, loss = column(epochs, "val_loss")
    if where:
        axis.plot(where, loss, color="tab:orange", marker="o", markersize=3, label="validation")
    values = [v for rows, name in ((steps, "loss"), (epochs, "train_loss")) for v in column(rows, name)[1]]
    if values and min(values) > 0 and max(values) / min(values) > 20:
        axis.set_yscale("log")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
