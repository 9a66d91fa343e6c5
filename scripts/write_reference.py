"""Write what follows from the schemas: the reference pages, and the files of the drivers."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from everyrank.apps.video_restoration.options.keys import DATASET_TYPES, Options
from everyrank.config.resolve import import_object, object_path
from everyrank.config.schema import section_of
from everyrank.diagnosis.watch_config import WatchConfig
from everyrank.lint.rule import Rule
from everyrank.lint.rules import RULES as LINT_RULES
from everyrank.training.config import TrainerConfig
from everyrank.training.saving.changes import OF_THE_RATE, RULES

ROOT = Path(__file__).resolve().parent.parent
DRIVERS = ROOT / "src" / "everyrank" / "conf" / "driver"
_WIDTH, _COLUMN = 120, 26

_TRAINER = """\
Every key that `TrainerDDP` reads. This page is written from the schema by `python scripts/write_reference.py`.

Values that are classes or functions are written as `!pyobject package.module.name` in YAML that is read with
`everyrank.get_loader()`, or as the same name in plain text. A section that says *section* has a table of its own below.
A key, type or value that is not listed here is refused, with its path and the nearest name that is.
"""

_WATCH = """\
Settings of a run, not of the trainer: `everyrank run watch.stall_s=30 ...`. See
[Who is guilty](../runs.md#who-is-guilty).
"""
_OPTIONS = """\
Option files are JSON with `//` comments; commas left over where a line was commented out do no harm. Unknown keys are
refused with the nearest known name, for a misspelt key would be a setting that silently does nothing. Keys of older
code that mean nothing here are known too: they are ignored, and the log says so. The resolved `options.json` that a run
leaves is itself an option file.

This page is written from the schema by `python scripts/write_reference.py`.

Samples of each `dataset_type`:

| `dataset_type` | samples |
| --- | --- |
"""

_SUBJECTS = {
    "0": "Starting",
    "1": "The process group",
    "2": "Data",
    "3": "The model",
    "4": "What some ranks do, and all should not",
    "5": "Numbers",
}
_RULES = """\
# The rules of everyrank check

<!-- Made from the docstrings of the rules: python scripts/write_reference.py -->

A rule is on by default unless it is called a hint: hints are often a choice and no mistake. Select them by their code
or with `--select ALL`. A safe fix is applied by `--fix`, an unsafe one by `--fix --unsafe`.

`ER000` stands for a file that does not parse. It is always reported, unless it is ignored by its whole code.
"""
_FIX = {"safe": "It has a safe fix.", "unsafe": "It has an unsafe fix.", "none": "It has no fix."}


def written() -> dict[Path, str]:
    """Path and content of every file that is written from a schema."""
    trainer = reference_page(TrainerConfig, title="Configuration of TrainerDDP", introduction=_TRAINER.strip())
    watch = reference_page(WatchConfig, title="watch", introduction=_WATCH.strip())
    kinds = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in DATASET_TYPES.items())
    files = {
        ROOT / "docs/reference/configuration.md": f"{trainer}\n#{watch}",
        ROOT / "docs/video_restoration_options.md": reference_page(
            Options, title="Options of video restoration", introduction=_OPTIONS + kinds
        ),
        ROOT / "docs/check/rules.md": rules_page(),
    }
    for path in sorted(DRIVERS.glob("*.yaml")):
        target = yaml.safe_load(path.read_text())["_target_"]
        files[path] = group_file(import_object(target).config_type, target=target)
    return files


def changes() -> str:
    """The table of what becomes of a changed setting, as ``docs/runs.md`` has it."""
    rows = [f"| `{key}` | {fate.value} |" for key, fate in RULES.items()]
    rows.insert(list(RULES).index("training.optimizer_kwargs") + 1, f"| `{OF_THE_RATE}`, with a scheduler | refused |")
    return "\n".join(["| changed setting | what happens |", "|---|---|", *rows])


def reference_page(schema: type, *, title: str, introduction: str) -> str:
    """Return a Markdown page with every key of ``schema``: type, default and meaning.

    Args:
        schema: A class made by ``everyrank.config.schema.section``.
        title: Title of the page.
        introduction: What comes before the tables.
    """
    parts = [f"# {title}", introduction]
    top, nested = _split(schema, "")
    parts.append(_table(top))
    for name, section in nested:
        parts += _section(name, section)
    return "\n\n".join(parts).rstrip() + "\n"


def group_file(schema: Any, *, target: str) -> str:
    """Return the YAML file of a configuration group: every key with its default, and what it means.

    Args:
        schema: A class made by ``everyrank.config.schema.section``; its docstring is the head of the file.
        target: Full name of the class that the group configures.
    """
    head = [f"# {line}".rstrip() for line in inspect.cleandoc(schema.__doc__ or "").splitlines()]
    lines = []
    for field in _fields(schema):
        info = schema.__pydantic_fields__[field.name]
        value = yaml.safe_dump(info.get_default(call_default_factory=True), default_flow_style=True, width=_WIDTH)
        setting = f"{field.name}: {value.splitlines()[0]}"
        meaning = str(info.description).replace("`", "")
        if len(setting) + len(meaning) + 4 <= _WIDTH:
            lines.append(f"{setting:<{_COLUMN}}  # {meaning}")
        else:
            lines += [*(f"# {line}" for line in textwrap.wrap(meaning, _WIDTH - 2)), setting]
    return "\n".join([*head, f"_target_: {target}", *lines]).replace("``", "") + "\n"


def _section(path: str, section: Any) -> list[str]:
    own, nested = _split(section, path)
    parts = [f"## `{path}`", _first_line(section), _table(own)]
    for name, inner in nested:
        parts += _section(f"{path}.{name}", inner)
    return parts


def _split(schema: Any, path: str) -> tuple[list[tuple[str, str, str, str]], list[tuple[str, Any]]]:
    """Return the rows of a section's table, and the sections within it."""
    hints = typing.get_type_hints(schema, include_extras=True)
    rows, nested = [], []
    for field in _fields(schema):
        info = schema.__pydantic_fields__[field.name]
        inner = _nested(hints[field.name])
        kind = f"[section](#{_anchor(f'{path}{field.name}')})" if inner is not None else _kind(hints[field.name])
        rows.append((f"`{field.name}`", kind, _default(info), str(info.description)))
        if inner is not None:
            nested.append((field.name, inner))
    return rows, nested


def _fields(schema: Any) -> list[Any]:
    """A section's keys: its own first, then those that it shares with others."""
    own = vars(schema).get("__annotations__", {})
    return sorted(dataclasses.fields(schema), key=lambda field: field.name not in own)


def _nested(annotation: Any) -> Any:
    """Return the section behind an annotation: itself, within a union, or as the values of a dictionary."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _nested(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is dict:
        return _nested(typing.get_args(annotation)[1])
    return section_of(annotation)


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *extras = typing.get_args(annotation)
        words = next((extra for extra in extras if isinstance(extra, str)), None)
        return words or _kind(inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(arg) for arg in typing.get_args(annotation))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin is list:
        return f"list of {_kind(typing.get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    names = {int: "whole number", float: "number", bool: "true/false", str: "text", type(None): "null", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(info: Any) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if callable(value):
        return f"`{object_path(value)}`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _first_line(section: Any) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "")


def rules_page() -> str:
    """Return ``docs/check/rules.md``."""
    parts = [_RULES]
    subject = ""
    for rule in LINT_RULES:
        if rule.code[2] != subject:
            subject = rule.code[2]
            parts.append(f"## {_SUBJECTS[subject]}\n")
        parts.append(_rule(rule))
    return "\n".join(parts)


def _rule(rule: Rule) -> str:
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
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
