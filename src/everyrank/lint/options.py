"""Option files (JSON, also with comments, and YAML) as the rules see them: every scalar with its keys and its place."""

from __future__ import annotations

import json.decoder
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from everyrank.lint.script import Script

_BLANK = re.compile(r"(?:\s+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_ATOM = re.compile(r"[^\s,\]}/]+")


@dataclass(frozen=True)
class Scalar:
    """A value of an option file.

    Attributes:
        keys: The keys that lead to it; an element of a list has its number.
        value: Its text, without quotes.
        start: Offset of its first character in the file, quotes included.
        end: One past its last character.
    """

    keys: tuple[str, ...]
    value: str
    start: int
    end: int

    @property
    def key(self) -> str:
        """The last key that is no number, in lower case."""
        return next((k.lower() for k in reversed(self.keys) if not k.isdigit()), "")


@dataclass
class Options:
    """The scalars of one option file, and the shell commands among them."""

    text: str
    path: str = ""
    scalars: list[Scalar] = field(default_factory=list)

    def shell_parts(self) -> Iterator[tuple[int, Script]]:
        """Yield what looks like a launch, with its offset: a command of a CI file, of a Job's container..."""
        for scalar in self.scalars:
            raw = self.text[scalar.start : scalar.end]
            if "torch.distributed.launch" in raw or "torchrun" in raw:
                quoted = raw[:1] in "\"'" and raw[-1:] == raw[:1]
                skip = 1 if quoted else len(raw) - len(raw.split("\n", 1)[-1]) if raw[:1] in "|>" else 0
                yield scalar.start + skip, Script(raw[skip : len(raw) - quoted], self.path, whole=False)


def read_yaml(text: str, path: str) -> Options:
    """Read YAML of any number of documents, whatever its tags.

    Raises:
        ValueError: It is no YAML; the message says where.
    """
    import yaml

    options = Options(text, path)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        for document in yaml.compose_all(text, Loader=loader):
            options.scalars += _of_node(document, ()) if document is not None else ()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return options


def _of_node(node: Any, keys: tuple[str, ...], depth: int = 0) -> Iterator[Scalar]:
    if depth > 60:  # an alias may hold itself
        return
    if node.id == "mapping":
        for key, value in node.value:
            yield from _of_node(value, (*keys, str(key.value)), depth + 1)
    elif node.id == "sequence":
        for number, value in enumerate(node.value):
            yield from _of_node(value, (*keys, str(number)), depth + 1)
    else:
        yield Scalar(keys, str(node.value), node.start_mark.index, node.end_mark.index)


def read_json(text: str, path: str) -> Options:
    """Read JSON; comments of the kinds ``//`` and ``/* */`` are allowed, as option files of the field have them.

    Raises:
        ValueError: It is no JSON; the message says where.
    """
    options = Options(text, path)
    end, found = _json_value(text, _skip(text, 0), ())
    options.scalars += found
    if _skip(text, end) != len(text):
        raise ValueError(f"characters after the end of the JSON at offset {end}")
    return options


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _json_value(text: str, at: int, keys: tuple[str, ...]) -> tuple[int, list[Scalar]]:
    """Read the value at ``at``; returns the offset behind it and its scalars."""
    head = text[at : at + 1]
    if head == '"':
        value, end = json.decoder.scanstring(text, at + 1)  # type: ignore[attr-defined]
        return end, [Scalar(keys, value, at, end)]
    if head in ("{", "["):
        return _json_group(text, at, keys, "}" if head == "{" else "]")
    match = _ATOM.match(text, at)
    if match is None:
        raise ValueError(f"a value is missing at offset {at}")
    return match.end(), [Scalar(keys, match[0], at, match.end())]


def _json_group(text: str, at: int, keys: tuple[str, ...], close: str) -> tuple[int, list[Scalar]]:
    found: list[Scalar] = []
    number, at = 0, _skip(text, at + 1)
    while text[at : at + 1] != close:
        if at >= len(text):
            raise ValueError(f"{close!r} is missing at the end of the file")
        name = str(number)
        if close == "}":
            if text[at] != '"':
                raise ValueError(f"a key in double quotes is missing at offset {at}")
            name, at = json.decoder.scanstring(text, at + 1)  # type: ignore[attr-defined]
            at = _skip(text, at)
            if text[at : at + 1] != ":":
                raise ValueError(f"':' is missing at offset {at}")
            at = _skip(text, at + 1)
        end, scalars = _json_value(text, at, (*keys, name))
        found += scalars
        number, at = number + 1, _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != close:
            raise ValueError(f"',' or {close!r} is missing at offset {at}")
    return at + 1, found
