"""What a rule finds, and the edits that would mend it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True, order=True)
class Edit:
    """Replace characters ``start`` to ``end`` of a text by ``text``; an insertion where both are equal."""

    start: int
    end: int
    text: str

    def shifted(self, offset: int) -> Edit:
        """The same edit of a text in which this one begins at ``offset``."""
        return Edit(self.start + offset, self.end + offset, self.text)


@dataclass(frozen=True)
class Fix:
    """A way to mend a finding.

    Attributes:
        message: What the edits do, in the imperative.
        edits: The edits; all of them or none.
        safe: A program that ran right before still does the same; ``--fix`` applies it.
    """

    message: str
    edits: tuple[Edit, ...]
    safe: bool = True


@dataclass(frozen=True)
class Finding:
    """One mistake at one place.

    Attributes:
        code: The rule's code, such as ``ER003``.
        message: What was found and what it does, in one sentence, and the cure after ``Fix:``.
        start: First character of the place, counted from the beginning of the text.
        end: One past its last character.
        fix: How it can be mended by the linter, or None.
    """

    code: str
    message: str
    start: int
    end: int
    fix: Fix | None = None

    def shifted(self, offset: int) -> Finding:
        """The same finding of a text in which this one begins at ``offset``."""
        fix = self.fix and Fix(self.fix.message, tuple(e.shifted(offset) for e in self.fix.edits), self.fix.safe)
        return Finding(self.code, self.message, self.start + offset, self.end + offset, fix)


class Lines:
    """Where the lines of a text begin."""

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def starts(self) -> list[int]:
        """Offset of each line's first character."""
        return [0, *(match.end() for match in _LINE_END.finditer(self.text))]

    def place(self, offset: int) -> tuple[int, int]:
        """Return the row and column of a character, both from 1."""
        import bisect

        row = bisect.bisect_right(self.starts, offset)
        return row, offset - self.starts[row - 1] + 1

    def line(self, row: int) -> str:
        """Return the text of a row (from 1), without its end."""
        begin = self.starts[row - 1]
        match = _LINE_END.search(self.text, begin)
        return self.text[begin : match.start() if match else len(self.text)]


def apply_edits(text: str, fixes: list[Fix]) -> tuple[str, int]:
    """Apply as many of ``fixes`` as do not overlap; returns the new text and how many were applied.

    Two fixes may share an edit (the import that both need): it is made once.
    """
    taken: set[Edit] = set()
    applied = 0
    for fix in fixes:
        if all(edit in taken or not any(_overlap(edit, other) for other in taken) for edit in fix.edits):
            taken |= set(fix.edits)
            applied += 1
    for edit in sorted(taken, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text, applied


def _overlap(one: Edit, other: Edit) -> bool:
    if one.start == other.start:
        return True  # also two insertions at one place, whose order would be chance
    first, second = sorted((one, other))
    return second.start < first.end
