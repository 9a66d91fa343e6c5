"""What a rule is: a code, the functions that look, and a page of documentation in the first one's docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from everyrank.lint.finding import Finding

# A function that is given a part of a file (PythonModule, Script or Options) and yields what it finds.
Check = Callable[[Any], Iterator[Finding]]

_EXAMPLE = re.compile(r"^(Before|After)(?: \((\w+)\))?:\n\n((?:    .*\n|\n)+)", re.MULTILINE)
_SECTION = re.compile(r"^(Finds|Why it hurts|The change): (.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
_LANGUAGE_OF_KIND = {"python": "python", "shell": "bash", "options": "yaml"}


@dataclass(frozen=True)
class Page:
    """What the documentation says of a rule; all of it comes from the docstring."""

    title: str
    finds: str
    why: str
    change: str
    before: str
    after: str
    language: str


@dataclass(frozen=True)
class Rule:
    """One kind of mistake.

    Attributes:
        code: ``ER`` and three digits; the first digit is the subject.
        name: A few words with hyphens.
        checks: For each kind of part (``python``, ``shell``, ``options``) the function that looks at it.
        default: It is on unless ignored. A hint, which is often a choice and no mistake, is off unless selected.
        fixes: What its fixes are at best: ``safe``, ``unsafe`` or ``none``.
    """

    code: str
    name: str
    checks: Mapping[str, Check]
    default: bool = True
    fixes: str = "none"

    @property
    def page(self) -> Page:
        """The documentation of the rule."""
        kind, check = next(iter(self.checks.items()))
        text = inspect.cleandoc(check.__doc__ or "") + "\n"
        sections = {match[1]: " ".join(match[2].split()) for match in _SECTION.finditer(text)}
        examples = {match[1]: (match[2], inspect.cleandoc(match[3]) + "\n") for match in _EXAMPLE.finditer(text)}
        return Page(
            title=text.split("\n")[0].rstrip("."),
            finds=sections["Finds"],
            why=sections["Why it hurts"],
            change=sections["The change"],
            before=examples["Before"][1],
            after=examples["After"][1],
            language=examples["Before"][0] or _LANGUAGE_OF_KIND[kind],
        )

    @property
    def url(self) -> str:
        """Where its page is, from the root of the documentation."""
        return f"check/rules.html#{self.code.lower()}"
