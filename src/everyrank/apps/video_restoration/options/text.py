"""JSON as people write it in option files: with ``//`` comments and commas left over where a line was commented out."""

from __future__ import annotations

import json
from typing import Any

from everyrank import ConfigError


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
    significant: list[int] = []  # where the characters are that are neither blank, comment nor inside a string
    i = 0
    while i < len(chars):
        if chars[i] == '"':
            significant.append(i)
            i += 1
            while i < len(chars) and chars[i] not in '"\n':
                i += 2 if chars[i] == "\\" else 1
            i += 1
        elif text.startswith("//", i):
            while i < len(chars) and chars[i] != "\n":
                chars[i] = " "
                i += 1
        else:
            if not chars[i].isspace():
                significant.append(i)
            i += 1
    kept = ""
    last_comma = -1
    for at in significant:
        if chars[at] == ",":
            if kept in ("", "{", "[", ","):
                chars[at] = " "
                continue
            last_comma = at
        elif chars[at] in "}]" and kept == ",":
            chars[last_comma] = " "
        kept = chars[at]
    return "".join(chars)
