"""What is written from a schema, so that it cannot say something else: the reference page, and a group's YAML file."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
import types
import typing
from typing import Any, Literal

import yaml

from everyrank.config.resolve import object_path
from everyrank.config.schema import section_of

_WIDTH, _COLUMN = 120, 26


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
    own = [field for field in dataclasses.fields(schema) if field.name in vars(schema).get("__annotations__", {})]
    rest = [field for field in dataclasses.fields(schema) if field not in own]
    lines = []
    for field in (*own, *rest):
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
    for field in dataclasses.fields(schema):
        info = schema.__pydantic_fields__[field.name]
        inner = _nested(hints[field.name])
        kind = f"[section](#{_anchor(f'{path}{field.name}')})" if inner is not None else _kind(hints[field.name])
        rows.append((f"`{field.name}`", kind, _default(info), str(info.description)))
        if inner is not None:
            nested.append((field.name, inner))
    return rows, nested


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
