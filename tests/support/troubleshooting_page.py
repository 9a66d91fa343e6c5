"""The entries of the troubleshooting page, and whether what was printed is what they quote."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conftest import ROOT

_PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
_HEADING = re.compile(r"^### (.+?) \{ ?#([a-z0-9-]+) ?\}$", re.MULTILINE)
_QUOTE = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VERDICT = "verdict-"  # entries of a cause: provoked by the tests of verdicts, whose runs they share


@dataclass(frozen=True)
class Entry:
    """One entry: its id, the lines it quotes (``...`` stands for anything within a line), and all of its text."""

    name: str
    quoted: tuple[str, ...]
    text: str

    def missing(self, told: str) -> list[str]:
        """The quoted lines that were not printed."""
        return [line for line in self.quoted if not re.search(_pattern(line), told)]


def _entries() -> dict[str, Entry]:
    parts = _HEADING.split(_PAGE)[1:]
    entries = {}
    for _, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        quoted = [line.strip() for block in _QUOTE.findall(body) for line in block.splitlines() if line.strip()]
        assert name not in entries, f"two entries are {name}"
        entries[name] = Entry(name, tuple(quoted), body)
    return entries


def _pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.split("..."))


ENTRIES = _entries()
