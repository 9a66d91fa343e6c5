"""How findings are told: as text, as JSON like ruff's, as GitHub annotations, as SARIF 2.1.0; and fixes as a diff."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from everyrank.lint.engine import DOES_NOT_PARSE, Checked
from everyrank.lint.finding import Finding, Lines
from everyrank.lint.rule import Rule
from everyrank.lint.rules import RULES

_RULES: dict[str, Rule] = {rule.code: rule for rule in RULES}


class Place:
    """Where a finding is, as people count: rows and columns from 1, in a notebook within its cell."""

    def __init__(self, checked: Checked) -> None:
        self._checked = checked
        self._lines: dict[int, Lines] = {}

    def of(self, offset: int) -> tuple[int, int, int | None]:
        """Return row, column and number of the cell (None outside notebooks) of a character."""
        source = self._checked.source
        if source is None:
            return 1, 1, None
        cell, begin = source.cell_at(offset) if source.cells else (None, 0)
        if begin not in self._lines:
            self._lines[begin] = Lines(cell.text if cell else source.text)
        row, column = self._lines[begin].place(offset - begin)
        return row, column, cell.number if cell else None


def _findings(results: Sequence[Checked]) -> Iterator[tuple[Checked, Place, Finding]]:
    for checked in results:
        place = Place(checked)
        for finding in checked.findings:
            yield checked, place, finding


def as_text(results: Sequence[Checked]) -> Iterator[str]:
    """Yield a line a finding: ``path:row:column: code message``."""
    for checked, place, finding in _findings(results):
        row, column, cell = place.of(finding.start)
        where = f"{checked.path}:{f'cell {cell}:' if cell else ''}{row}:{column}"
        mark = "" if finding.fix is None else " [*]" if finding.fix.safe else " [-]"
        yield f"{where}: {finding.code}{mark} {finding.message}"


def as_json(results: Sequence[Checked]) -> str:
    """Return a list of findings with the keys that ruff's JSON has."""
    found = [
        {
            "cell": place.of(finding.start)[2],
            "code": finding.code,
            "end_location": _location(place, finding.end),
            "filename": str(Path(checked.path).absolute()),
            "fix": _fix(place, finding),
            "location": _location(place, finding.start),
            "message": finding.message,
            "url": _RULES[finding.code].url if finding.code in _RULES else None,
        }
        for checked, place, finding in _findings(results)
    ]
    return json.dumps(found, indent=2)


def _location(place: Place, offset: int) -> dict[str, int]:
    row, column, _ = place.of(offset)
    return {"row": row, "column": column}


def _fix(place: Place, finding: Finding) -> dict[str, Any] | None:
    if finding.fix is None:
        return None
    return {
        "applicability": "safe" if finding.fix.safe else "unsafe",
        "message": finding.fix.message,
        "edits": [
            {"content": e.text, "location": _location(place, e.start), "end_location": _location(place, e.end)}
            for e in sorted(finding.fix.edits)
        ],
    }


def as_github(results: Sequence[Checked]) -> Iterator[str]:
    """Yield a workflow command a finding, which GitHub shows beside the line."""
    for checked, place, finding in _findings(results):
        row, column, cell = place.of(finding.start)
        end_row, end_column, _ = place.of(finding.end)
        where = {"file": checked.path, "line": row, "col": column, "endLine": end_row, "endColumn": end_column}
        title = f"everyrank ({finding.code})"
        options = ",".join(f"{k}={_escaped(str(v), option=True)}" for k, v in where.items())
        text = f"{f'cell {cell}: ' if cell else ''}{finding.message}"
        yield f"::error {options},title={_escaped(title, option=True)}::{_escaped(text)}"


def _escaped(text: str, *, option: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if option else text


def as_sarif(results: Sequence[Checked], version: str) -> str:
    """Return a SARIF 2.1.0 log, which code scanning reads."""
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "everyrank check",
                        "version": version,
                        "rules": [_UNPARSED, *(_sarif_rule(rule) for rule in RULES)],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_sarif_result(*found) for found in _findings(results)],
            }
        ],
    }
    return json.dumps(log, indent=2)


_UNPARSED = {
    "id": DOES_NOT_PARSE,
    "name": "does-not-parse",
    "shortDescription": {"text": "The file does not parse, and was not checked"},
}


def _sarif_rule(rule: Rule) -> dict[str, Any]:
    page = rule.page
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": page.title},
        "fullDescription": {"text": page.why},
        "help": {"text": page.change},
        "defaultConfiguration": {"enabled": rule.default, "level": "error" if rule.default else "note"},
    }


def _sarif_result(checked: Checked, place: Place, finding: Finding) -> dict[str, Any]:
    row, column, _ = place.of(finding.start)
    end_row, end_column, _ = place.of(finding.end)
    region = {"startLine": row, "startColumn": column, "endLine": end_row, "endColumn": end_column}
    path = Path(checked.path)
    uri = path.as_uri() if path.is_absolute() else quote(path.as_posix())
    rule = _RULES.get(finding.code)
    return {
        "ruleId": finding.code,
        "level": "error" if rule is None or rule.default else "note",
        "message": {"text": finding.message},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri}, "region": region}}],
    }


def as_diff(results: Sequence[Checked]) -> Iterator[str]:
    """Yield a unified diff of each file that was mended, as patch reads it."""
    for checked in results:
        if checked.before is not None and checked.source is not None:
            yield diff(checked.path, checked.before, checked.source.whole_text)


def diff(path: str, before: str, after: str) -> str:
    """Return the unified diff of a file."""
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), path, path)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def summary(results: Sequence[Checked], num_files: int) -> str:
    """Return the last line of a run in text."""
    left = sum(len(c.findings) for c in results)
    mended = sum(c.num_fixed for c in results)
    safe = sum(f.fix is not None and f.fix.safe for c in results for f in c.findings)
    unsafe = sum(f.fix is not None and not f.fix.safe for c in results for f in c.findings)
    unread = sum(f.code == DOES_NOT_PARSE for c in results for f in c.findings)
    parts = [f"{num_files} file{'s' * (num_files != 1)} checked"]
    parts += [f"{mended} mended"] * bool(mended)
    parts += [f"{left} finding{'s' * (left != 1)}" if left else "nothing found"]
    text = ", ".join(parts) + (f" ({unread} of them a file that does not parse)" if unread else "")
    cures = [f"{safe} mended by --fix [*]"] * bool(safe) + [f"{unsafe} by --fix --unsafe [-]"] * bool(unsafe)
    return f"{text}; {', '.join(cures)}." if cures else f"{text}."
