"""One self-contained page of a run: its numbers, its curves, its checkpoints and its configuration."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from everyrank.checkpoint.folder import list_checkpoints
from everyrank.errors import DataError
from everyrank.training.history import read_history
from everyrank.training.plots import draw_curves

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 0.8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
"""


def write_report(run: Path, target: Path | None = None) -> Path:
    """Write ``report.html`` of a run's folder: one file that needs no other.

    Args:
        run: The run's folder.
        target: Where to write; by default ``<run>/report.html``.

    Returns:
        The page's path.

    Raises:
        DataError: If the folder has no history.
    """
    history = run / "history.jsonl"
    if not history.is_file():
        raise DataError(f"{run} has no history.jsonl. Give the folder of a run (training.path) that has started.")
    rows = read_history(history)
    epochs = [_numbers(row) for row in rows if row["kind"] == "epoch"]
    tests = [_numbers(row) for row in rows if row["kind"] == "test"]
    checkpoints = [
        {"checkpoint": info.path.name, "metric": info.metric, "MB": info.num_bytes / 1e6, "ranks": info.world_size}
        for info in list_checkpoints(run / "checkpoints", verify=False)
    ]
    name = html.escape(run.resolve().name)
    parts = [f"<h1>{name}</h1>", _summary(epochs)]
    if tests:
        parts += ["<h2>Test</h2>", _table(tests)]
    parts += [_figure(history), "<h2>Epochs</h2>", _table(epochs), "<h2>Checkpoints</h2>", _table(checkpoints)]
    config = run / "config.yaml"
    if config.is_file():
        text = html.escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>Configuration</summary><pre>{text}</pre></details>")
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
    target = target if target is not None else run / "report.html"
    target.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")
    return target


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: value for key, value in row.items() if key != "kind"}
    if "epoch" in numbers:
        numbers["epoch"] += 1  # people count from 1
    return numbers


def _summary(epochs: Sequence[Mapping[str, Any]]) -> str:
    if not epochs:
        return "<p>No epoch is finished yet.</p>"
    last, seconds = epochs[-1], sum(row["seconds"] for row in epochs)
    text = f"{last['epoch']} epochs, {last['step']:,} optimizer steps, {seconds:,.0f} s of training."
    validated = [row for row in epochs if row.get("val_loss") is not None]
    if validated:
        best = min(validated, key=lambda row: row["val_loss"])
        text += f" Best validation loss {best['val_loss']:.4g} after epoch {best['epoch']}."
    return f"<p>{text}</p>"


def _figure(history: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        figure = Path(folder) / "curves.png"
        if not draw_curves(history, figure):
            return ""
        data = base64.b64encode(figure.read_bytes()).decode("ascii")
    return f'<img alt="Loss curves" src="data:image/png;base64,{data}">'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(_cells(row.get(name) for name in names) for row in rows)}</table>"


def _cells(values: Iterable[Any]) -> str:
    shown = ("" if v is None else f"{v:.4g}" if isinstance(v, float) else html.escape(str(v)) for v in values)
    return "<tr>" + "".join(f"<td>{text}</td>" for text in shown) + "</tr>"
