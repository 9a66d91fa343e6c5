"""The page: one HTML file that needs nothing else, with every text of the run escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from everyrank.diagnosis.telling import describe
from everyrank.reporting.charts import Line, draw, legend
from everyrank.reporting.run_facts import RunFacts, is_number
from everyrank.reporting.style import STYLE

# The browser enforces what the page promises: nothing is fetched and no script runs, whatever a log line says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SHARES = ("data", "compute", "waiting")
_MAX_EPOCHS = 100
_BASELINE = "val_bicubic_"  # video restoration's baseline, to be seen beside the network
_NOT_DRAWN = {"step", "epoch", "num_samples", "val_num_samples", "seconds", "num_skipped"}


def render(facts: RunFacts) -> str:
    """Return the whole page of a run as HTML."""
    sections = [
        _heading(facts),
        _section("Verdict", _verdicts(facts)),
        _section("Result", _result(facts)),
        _section("Curves", _curves(facts)),
        _section("Figures", _figures(facts)),
        _section("Ranks", _ranks(facts)),
        _section("History", _history(facts)),
        _section("Checkpoints", _checkpoints(facts)),
        _section("Ledger", _ledger(facts)),
        _section("Versions", _pairs(facts.versions) if facts.versions else ""),
        _section("Configuration", _configs(facts)),
        _section("Logs", _logs(facts)),
        _section("What could not be read", "".join(f"<p>{escape(problem)}</p>" for problem in facts.problems)),
    ]
    title = escape(facts.folder.resolve().name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} · everyrank</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _heading(facts: RunFacts) -> str:
    epochs = _of_kind(facts, "epoch")
    steps = [row["step"] for row in facts.rows if is_number(row.get("step"))]
    sound = sum(info.verified is True for info in facts.checkpoints)
    damaged = len(facts.checkpoints) - sound
    cards = [("optimizer steps", f"{int(max(steps)):,}" if steps else "none yet")]
    if epochs:
        cards.append(("epochs", f"{len(epochs)}"))
        losses = [row["val_loss"] for row in epochs if is_number(row.get("val_loss"))]
        if losses:
            cards.append(("lowest validation loss", _number(min(losses))))
        for name, title, form in (("samples_per_s", "samples/s", ",.0f"), ("mfu", "MFU", ".1%")):
            if is_number(value := epochs[-1].get(name)):
                cards.append((title, format(value, form)))
    sizes = facts.ledger.world_sizes if facts.ledger else tuple({i.world_size: 0 for i in facts.checkpoints})
    if any(sizes):
        cards.append(("world size", " → ".join(str(size) for size in sizes if size)))
    if facts.checkpoints:
        text = f"{sound} verified" + (f", {damaged} damaged" if damaged else "")
        cards.append(("checkpoints", text))
    if facts.ledger:
        once = all(most == 1 for _, _, most in facts.ledger.epochs.values())
        cards.append(("any sample twice in an epoch", "no" if once else "YES"))
    boxes = "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in cards)
    state = "" if facts.result is not None else " · no result yet: the run is under way, was stopped, or returns none"
    where = escape(str(facts.folder))
    return f'<h1>{escape(facts.folder.resolve().name)}</h1><div class="soft">{where}{state}</div>' + (
        f'<div class="cards">{boxes}</div>'
    )


def _result(facts: RunFacts) -> str:
    if facts.result is None:
        return ""
    if isinstance(facts.result, Mapping):
        return _pairs(facts.result)
    return _pre(json.dumps(facts.result, indent=2, ensure_ascii=False))


def _verdicts(facts: RunFacts) -> str:
    return "".join(
        (f"<h3>attempt {verdict.attempt}</h3>" if len(facts.verdicts) > 1 else "") + _pre(describe(verdict, 0))
        for verdict in facts.verdicts
    )


def _ranks(facts: RunFacts) -> str:
    """How the ranks shared the time: of their latest collectives, and of each epoch that says so."""
    parts = []
    if facts.pace is not None:
        rows = [
            [str(row["rank"]), *(f"{row[name]:.1%}" for name in _SHARES), str(row["last"])]
            for row in facts.pace["ranks"]
        ]
        told = f"The latest {facts.pace['num_collectives']} collectives, {_number(facts.pace['seconds'])} s."
        slow = f"<p>{escape(facts.pace['said'])}</p>" if facts.pace["said"] else ""
        parts.append(f"<p class=soft>{told}</p>{slow}{_table(['rank', *_SHARES, 'last to come'], rows)}")
    epochs = [row for row in _of_kind(facts, "epoch") if isinstance(row.get("rank_seconds"), Mapping)]
    rows = [
        [str(row["epoch"]), str(rank), *(_number(values[rank]) if values else "" for values in _seconds(row))]
        for row in epochs[-_MAX_EPOCHS:]
        for rank in range(len(row["rank_seconds"]["data"]))
    ]
    if rows:
        parts.append(_table(["epoch", "rank", *(f"{name}, s" for name in _SHARES)], rows))
    return "".join(parts)


def _seconds(row: Mapping[str, Any]) -> list[Sequence[float]]:
    return [row["rank_seconds"].get(name, ()) for name in _SHARES]


def _curves(facts: RunFacts) -> str:
    steps = [row for row in facts.rows if row.get("kind", "step") == "step"]
    epochs = [*_of_kind(facts, "epoch"), *_of_kind(facts, "validation")]
    means = _points(epochs, "train_loss")
    charts = {
        "loss": [
            Line(name="training, each step", points=_points(steps, "loss"), style="faint" if means else "train"),
            Line(name="training, epoch mean", points=means),
            Line(name="validation", points=_points(epochs, "val_loss"), style="held-out"),
        ]
    }
    drawn = {*_NOT_DRAWN, "loss", "train_loss", "val_loss", "val_loss_std"}
    others = [name for row in (*epochs, *steps) for name, value in row.items() if is_number(value)]
    for name in dict.fromkeys(other for other in others if other not in drawn):
        rows = epochs if any(name in row for row in epochs) else steps
        title, is_baseline = name.removeprefix("val_"), name.startswith(_BASELINE)
        style = "held-out" if name.startswith("val_") and not is_baseline else "train"
        line = Line(name=name, points=_points(rows, name), style=style)
        charts.setdefault(title.removeprefix("bicubic_") if is_baseline else title, []).append(line)
    boxes = [
        f'<div class="chart"><h3>{escape(title)}</h3>{svg}{legend(lines)}</div>'
        for title, lines in charts.items()
        if (svg := draw(lines, "optimizer step", title))
    ]
    return f'<div class="charts">{"".join(boxes)}</div>' if boxes else ""


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [
        (float(row["step"]), float(row[name]))
        for row in rows
        if is_number(row.get("step")) and is_number(row.get(name))
    ]


def _figures(facts: RunFacts) -> str:
    return "".join(
        f'<figure><img alt="{escape(name, quote=True)}" src="data:{kind};base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for name, kind, data in facts.images
    )


def _history(facts: RunFacts) -> str:
    parts = []
    for kind in dict.fromkeys(str(row.get("kind", "step")) for row in facts.rows):
        rows = [row for row in facts.rows if str(row.get("kind", "step")) == kind]
        names = list(dict.fromkeys(name for row in rows for name in row if name != "kind"))
        table = _table(names, [[_number(row.get(name)) for name in names] for row in rows[-1000:]])
        is_open = " open" if kind != "step" or len(rows) <= 30 else ""
        count = f"{len(rows):,} row{'s' if len(rows) != 1 else ''}"
        parts.append(f"<details{is_open}><summary>{escape(kind)} <span class=soft>{count}</span></summary>{table}")
        parts.append("</details>")
    return "".join(parts)


def _checkpoints(facts: RunFacts) -> str:
    rows = [
        [
            f"{info.step:,}",
            "" if info.metric is None else _number(info.metric),
            _size(info.num_bytes),
            str(info.world_size or ""),
            "verified" if info.verified else f"DAMAGED: {info.reason}",
        ]
        for info in facts.checkpoints
    ]
    return _table(["step", "metric", "size", "world size", "state"], rows) if rows else ""


def _ledger(facts: RunFacts) -> str:
    if facts.ledger is None:
        return ""
    rows = [
        [str(epoch), f"{total:,}", f"{different:,}", str(most), "yes" if most == 1 else "NO"]
        for epoch, (total, different, most) in facts.ledger.epochs.items()
    ]
    sizes = " → ".join(str(size) for size in facts.ledger.world_sizes)
    told = f"<p class=soft>{facts.ledger.num_steps:,} committed optimizer steps, world size {sizes}.</p>"
    return told + _table(["epoch", "samples used", "different ones", "most often one", "none twice"], rows)


def _configs(facts: RunFacts) -> str:
    titles = {"run.yaml": "run.yaml: the composed run", "config.yaml": "config.yaml: the trainer, defaults included"}
    return "".join(
        f"<details><summary>{escape(titles.get(name, name))}</summary>{_pre(text)}</details>"
        for name, text in facts.configs.items()
    )


def _logs(facts: RunFacts) -> str:
    return "".join(
        f"<details{' open' if rank == 0 else ''}><summary>rank {rank} <span class=soft>last {len(lines)} lines</span>"
        f"</summary>{_pre(chr(10).join(lines))}</details>"
        for rank, lines in facts.logs.items()
        if lines
    )


def _of_kind(facts: RunFacts, kind: str) -> list[Mapping[str, Any]]:
    return [row for row in facts.rows if row.get("kind") == kind]


def _pairs(values: Mapping[Any, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td class=text>{escape(_number(value))}</td></tr>"
        for name, value in values.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll tall"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    mark = ' class="bad"' if text.startswith(("DAMAGED", "NO")) else ' class="good"' if text == "verified" else ""
    return f"<td{mark}>{escape(text)}</td>"


def _pre(text: str) -> str:
    return f'<div class="scroll tall"><pre>{escape(text)}</pre></div>'


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
