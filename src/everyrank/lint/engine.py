"""Checking one file, many files, and mending them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from everyrank.lint.finding import Finding, Fix, Lines, apply_edits
from everyrank.lint.rule import Rule
from everyrank.lint.rules import RULES
from everyrank.lint.source import DoesNotParse, Source, read, write

DOES_NOT_PARSE = "ER000"
_NOQA = re.compile(r"#\s*noqa(?P<codes>\s*:\s*[A-Z]+[0-9]+(?:[,\s]+[A-Z]+[0-9]+)*)?", re.IGNORECASE)
_MOST_ROUNDS = 10  # of mending one file: a fix may lay another mistake open


@dataclass(frozen=True)
class Settings:
    """What to look for and what to do about it.

    Attributes:
        codes: The rules that are on.
        fix: Apply safe fixes.
        unsafe: Apply the others too.
        write: Write what was mended; if false the new text is only returned.
    """

    codes: frozenset[str]
    fix: bool = False
    unsafe: bool = False
    write: bool = False


@dataclass
class Checked:
    """What became of one file.

    Attributes:
        path: The file.
        source: The file as it is in the end; None if it could not be read.
        before: The text at first, if it was mended.
        findings: What is left, in the order of the text.
        num_fixed: How many findings were mended.
    """

    path: str
    source: Source | None = None
    before: str | None = None
    findings: list[Finding] = field(default_factory=list)
    num_fixed: int = 0


def check_file(path: str, settings: Settings) -> Checked:
    """Check a file, and mend it if the settings say so."""
    source = None
    try:
        source = read(path)
        findings = find(source, settings.codes)
    except DoesNotParse as error:
        return Checked(path, source, findings=_unparsed(error, settings))
    before, num_fixed = source.whole_text, 0
    if settings.fix:
        for _ in range(_MOST_ROUNDS):
            fixes = [f.fix for f in findings if f.fix and (f.fix.safe or settings.unsafe) and _in_one_cell(source, f)]
            if not fixes:
                break
            text, applied = apply_edits(source.text, [fix for fix in fixes if _still_parses(source, fix)])
            if not applied:
                break
            source, num_fixed = source.with_text(text), num_fixed + applied
            findings = find(source, settings.codes)
    changed = source.whole_text != before
    if changed and settings.write:
        write(source)
    return Checked(path, source, before if changed else None, findings, num_fixed)


def _unparsed(error: DoesNotParse, settings: Settings) -> list[Finding]:
    if DOES_NOT_PARSE not in settings.codes:
        return []
    return [Finding(DOES_NOT_PARSE, f"Not checked, for it does not parse: {error}", error.offset, error.offset)]


def _still_parses(source: Source, fix: Fix) -> bool:
    """Whether a file can be read when this has been mended: what cannot be, is left as it was."""
    try:
        list(source.with_text(apply_edits(source.text, [fix])[0]).parts())
    except DoesNotParse:
        return False
    return True


def _in_one_cell(source: Source, finding: Finding) -> bool:
    if source.kind != "notebook" or finding.fix is None:
        return True
    return all(source.cell_at(e.start)[1] == source.cell_at(max(e.start, e.end - 1))[1] for e in finding.fix.edits)


def find(source: Source, codes: frozenset[str]) -> list[Finding]:
    """Return what the rules with these codes find in a file, but for what a ``# noqa`` allows.

    Raises:
        DoesNotParse: The file cannot be parsed.
    """
    rules = [rule for rule in RULES if rule.code in codes]
    found: set[Finding] = set()
    for kind, offset, part in source.parts():
        for rule in rules:
            found |= {finding.shifted(offset) for finding in _apply(rule, kind, part)}
        if kind == "shell" and part.error and part.whole and DOES_NOT_PARSE in codes and not _bash_accepts(part.text):
            found.add(Finding(DOES_NOT_PARSE, "The shell cannot read this; the rest was checked.", *part.error))
    lines = Lines(source.text)
    kept = [finding for finding in found if not _allowed(lines, finding)]
    return sorted(kept, key=lambda finding: (finding.start, finding.code, finding.message))


def _apply(rule: Rule, kind: str, part: object) -> Iterator[Finding]:
    check = rule.checks.get(kind)
    if check is not None and getattr(part, "is_relevant", True):
        yield from check(part)


def _bash_accepts(text: str) -> bool:
    """Whether bash itself reads the script: tree-sitter does not know all of its grammar."""
    bash = shutil.which("bash")
    if bash is None:
        return True
    done = subprocess.run([bash, "-n"], input=text.encode(), capture_output=True, check=False, timeout=20)
    return done.returncode == 0


def _allowed(lines: Lines, finding: Finding) -> bool:
    for row in {lines.place(finding.start)[0], lines.place(max(finding.start, finding.end - 1))[0]}:
        for match in _NOQA.finditer(lines.line(row)):
            if not match["codes"] or finding.code in re.findall(r"[A-Z]+[0-9]+", match["codes"].upper()):
                return True
    return False


def check_files(paths: Sequence[str], settings: Settings, *, num_workers: int = 1) -> Iterator[Checked]:
    """Check files in their order, by several processes if there are many."""
    if num_workers <= 1 or len(paths) < 40:
        for path in paths:
            yield check_file(path, settings)
        return
    import functools
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(num_workers) as pool:
        yield from pool.map(functools.partial(check_file, settings=settings), paths, chunksize=16)


def relative(path: str) -> str:
    """Return a path from the current folder if it lies in it."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return path
