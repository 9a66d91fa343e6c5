"""Line charts as inline SVG: no script, no picture file, sharp at every size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 38
_MAX_POINTS = 800
_LOG_FROM = 20.0  # a positive quantity that spans more than this ratio is drawn on a logarithmic axis


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
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    log = min(ys) > 0 and max(ys) / min(ys) > _LOG_FROM
    x_range, y_range = _padded(min(xs), max(xs), 0.0), _padded(*_on_axis((min(ys), max(ys)), log), 0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        share_x = (x - x_range[0]) / (x_range[1] - x_range[0])
        share_y = ((math.log10(y) if log else y) - y_range[0]) / (y_range[1] - y_range[0])
        return _LEFT + share_x * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - share_y * (_HEIGHT - _TOP - _BOTTOM)

    title = f"{y_label} over {x_label}"
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">']
    for value, text in _ticks(*y_range, log):
        _, y = place(x_range[0], value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 7}" y="{y + 3.5:.1f}">{text}</text>')
    for value, text in _ticks(*x_range, False):
        x, _ = place(value, 10 ** y_range[0] if log else y_range[0])
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}">{text}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" text-anchor="middle" x="{middle}" y="{_HEIGHT - 6}">{escape(x_label)}</text>')
    for line in lines:
        placed = [place(x, y) for x, y in _thinned(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(placed) <= 60 and line.style != "faint":
            parts += [f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in placed]
    return "".join([*parts, "</svg>"])


def legend(lines: Sequence[Line]) -> str:
    """Return the names of the curves beside their colours."""
    shown = [line for line in lines if line.points]
    return "".join(f'<span class="key {line.style}">{escape(line.name)}</span>' for line in shown)


def _on_axis(values: tuple[float, float], log: bool) -> tuple[float, float]:
    return (math.log10(values[0]), math.log10(values[1])) if log else values


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    margin = share * (high - low) if high > low else (abs(high) * 0.05 or 1.0)
    return low - margin, high + margin


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Keep at most ``_MAX_POINTS`` points, the last among them."""
    stride = -(-len(points) // _MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """Return values inside the range and their labels; on a logarithmic axis the range is that of the exponents."""
    if log:
        exponents = range(math.ceil(low), math.floor(high) + 1)
        stride = -(-len(exponents) // 6) or 1
        if len(exponents) >= 2:
            return [(10.0**e, f"{10.0**e:g}") for e in exponents[::stride]]
        return [(10**e, f"{10**e:.2g}") for e in (low, (low + high) / 2, high)]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(s for s in (step, 2 * step, 2.5 * step, 5 * step, 10 * step) if (high - low) / s <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{round(i * step, 12):g}") for i in range(first, last + 1)]
