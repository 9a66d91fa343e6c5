"""The page of the rules, made from their docstrings: ``python -m everyrank.lint.pages > docs/check/rules.md``."""

from __future__ import annotations

from everyrank.lint.rule import Rule
from everyrank.lint.rules import RULES

_SUBJECTS = {
    "0": "Starting",
    "1": "The process group",
    "2": "Data",
    "3": "The model",
    "4": "What some ranks do, and all should not",
    "5": "Numbers",
}
_HEAD = """\
# The rules of everyrank check

<!-- Made from the docstrings of the rules: python -m everyrank.lint.pages > docs/check/rules.md -->

A rule is on by default unless it is called a hint: hints are often a choice and no mistake. Select them by their code
or with `--select ALL`. A safe fix is applied by `--fix`, an unsafe one by `--fix --unsafe`.

`ER000` stands for a file that does not parse. It is always reported, unless it is ignored by its whole code.
"""
_FIX = {"safe": "It has a safe fix.", "unsafe": "It has an unsafe fix.", "none": "It has no fix."}


def rules_page() -> str:
    """Return ``docs/check/rules.md``."""
    parts = [_HEAD]
    subject = ""
    for rule in RULES:
        if rule.code[2] != subject:
            subject = rule.code[2]
            parts.append(f"## {_SUBJECTS[subject]}\n")
        parts.append(_section(rule))
    return "\n".join(parts)


def _section(rule: Rule) -> str:
    page = rule.page
    title = page.title.removesuffix(" (hint)")
    return f"""\
### {rule.code}: {title} {{ #{rule.code.lower()} }}

`{rule.name}`. {"On by default." if rule.default else "A hint: off by default."} {_FIX[rule.fixes]}

**What it finds.** {page.finds}

**Why it hurts.** {page.why}

**The change.** {page.change}

Before:

```{page.language}
{page.before}```

After:

```{page.language}
{page.after}```
"""


if __name__ == "__main__":
    print(rules_page(), end="")
