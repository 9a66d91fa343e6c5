"""JSON as people write it in option files: with ``//`` comments and commas left over where a line was commented out."""

from __future__ import annotations

import json
import re
from typing import Any

from everyrank import ConfigError

_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"?|//[^\n]*|\S', re.DOTALL)  # a string, a comment, any other character


def parse(text: str, source: str) -> tuple[dict[str, Any], list[str]]:
    """Parse an option file.

    Args:
        text: Its content.
        source: Its name, for messages.

    Returns:
        The options and a notice for each key that is given twice (the later value holds).

    Raises:
        ConfigError: The text is no JSON object; the message has line and column.
    """
    notices: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                notices.append(f"{source}: {key!r} is given twice in one section; the later value {value!r} holds")
            result[key] = value
        return result

    try:
        options = json.loads(to_json(text), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text.strip() else ""
        raise ConfigError(
            f"{source}: line {error.lineno}, column {error.colno}: {error.msg}. Found: {line.strip() or 'nothing'!r}. "
            "Mend the JSON there: comments start with //, names and texts stand in double quotes."
        ) from error
    if not isinstance(options, dict):
        raise ConfigError(f"{source}: found {type(options).__name__}; an option file is one object: {{ ... }}")
    return options, notices


def to_json(text: str) -> str:
    """Blank out comments and stray commas, so that every other character keeps its line and column."""
    chars = list(text)
    kept, last_comma = "", -1
    for token in _TOKEN.finditer(text):
        at, mark = token.start(), token[0][0]
        if token[0].startswith("//"):
            chars[at : token.end()] = " " * len(token[0])
            continue
        if mark == "," and kept in ("", "{", "[", ","):
            chars[at] = " "
            continue
        if mark in "}]" and kept == ",":
            chars[last_comma] = " "
        if mark == ",":
            last_comma = at
        kept = mark
    return "".join(chars)
