"""The figure of a run: loss curves, and one panel for each further metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everyrank.training.tracking.history import column, read_history

_PLAIN = ("val_loss", "val_loss_std", "val_num_samples")
_LOG_FROM = 20.0  # positive values that span more than this ratio are drawn on a logarithmic axis


def draw_curves(history: Path, figure: Path) -> bool:
    """Draw ``curves.png`` from a history file.

    Args:
        history: ``history.jsonl``.
        figure: Where to write the figure.

    Returns:
        False if there is nothing to draw.
    """
    rows = read_history(history) if history.exists() else []
    if not rows:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
        scale_axis(axis, column(epochs, name)[1])
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
    scale_axis(axis, values + loss)
    axis.set_ylabel("loss")
    axis.legend(frameon=False)


def scale_axis(axis: Any, values: Sequence[float]) -> None:
    """Fit a panel's vertical axis to values: logarithmic if they span much, with room around a curve that is flat."""
    axis.grid(alpha=0.3)
    if not values:
        return
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        axis.set_yscale("log")
        return
    axis.ticklabel_format(axis="y", useOffset=False)  # "0.9995", and not "-0.0005" below a "+1" in the corner
    flat = high - low <= 1e-6 * max(abs(low), abs(high))
    margin = 0.05 * abs(high) or 1.0 if flat else 0.06 * (high - low)
    axis.set_ylim(low - margin, high + margin)
