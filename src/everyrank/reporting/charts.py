"""Line charts as inline SVG, drawn by matplotlib: no script, no picture file, sharp at every size, values on hover."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from xml.etree import ElementTree

from everyrank.training.tracking.plots import scale_axis

_MAX_POINTS, _MAX_HOVERED, _MAX_DOTS = 800, 200, 60
_SVG = "{http://www.w3.org/2000/svg}"
# Colours that the page's style sheet knows by name, in a light and a dark form.
_COLOURS = {"#2d6cb5": "var(--train)", "#d9730d": "var(--held)", "#e3e5e8": "var(--edge)", "#667080": "var(--soft)"}
_TRAIN, _HELD_OUT, _EDGE, _SOFT = _COLOURS
_SETTINGS: dict[Any, Any] = {
    **{"svg.fonttype": "none", "svg.hashsalt": "everyrank", "text.parse_math": False, "font.size": 9},
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    **{"axes.edgecolor": _EDGE, "axes.labelcolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT},
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve.

    Attributes:
        name: Its name in the legend.
        points: Pairs of x and y, finite.
        style: CSS class: ``train``, ``faint`` or ``held-out``.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "train"


def draw(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Return a chart as an ``<svg>`` element, or an empty string if there is no point to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    # XML has no place for control characters, which a name may hold.
    y_label = "".join(letter if letter.isprintable() else "?" for letter in y_label)
    with rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the browser draws the text, whatever letters matplotlib's own font lacks
        figure = Figure(figsize=(6.2, 2.9), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(lines):
            faint = line.style == "faint"
            colour = _HELD_OUT if line.style == "held-out" else _TRAIN
            x, y = zip(*_thinned(line.points, _MAX_POINTS), strict=True)
            axes.plot(x, y, color=colour, linewidth=1 if faint else 1.8, alpha=0.3 if faint else 1, clip_on=False)
            x, y = zip(*_thinned(line.points, _MAX_HOVERED), strict=True)
            shown = 1 if len(line.points) <= _MAX_DOTS and not faint else 0
            axes.plot(x, y, "o", color=colour, markersize=4, alpha=shown, clip_on=False, gid=f"hover-{number}")
        scale_axis(axes, [y for line in lines for _, y in line.points])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(color=_EDGE, clip_on=False)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _as_part_of_a_page(written.getvalue(), lines, x_label, y_label)


def legend(lines: Sequence[Line]) -> str:
    """Return the names of the curves beside their colours."""
    shown = [line for line in lines if line.points]
    return "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in shown)


def _as_part_of_a_page(svg: str, lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Give the points their values, and leave out what belongs to a file alone: head, metadata, a style for all."""
    chart = ElementTree.fromstring(svg)
    for group in list(chart.iter(f"{_SVG}g")):
        kind, _, number = group.attrib.pop("id", "").partition("-")
        if kind == "hover":
            line = lines[int(number)]
            points = _thinned(line.points, _MAX_HOVERED)
            for dot, (x, y) in zip(group.iter(f"{_SVG}use"), points, strict=True):
                ElementTree.SubElement(dot, f"{_SVG}title").text = f"{line.name}: {y:.6g} at {x_label} {x:,.10g}"
    for part in [part for part in chart if part.tag != f"{_SVG}g"]:
        chart.remove(part)
    chart.attrib = {"viewBox": chart.attrib["viewBox"], "role": "img", "aria-label": f"{y_label} over {x_label}"}
    ElementTree.register_namespace("", _SVG.strip("{}"))
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    text = ElementTree.tostring(chart, encoding="unicode", short_empty_elements=False)
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    for colour, name in _COLOURS.items():
        text = text.replace(colour, name)
    return text


def _thinned(points: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
    """Keep about so many points at the most, the last among them."""
    stride = -(-len(points) // most)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]
