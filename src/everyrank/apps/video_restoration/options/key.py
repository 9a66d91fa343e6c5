"""What one key of an option file is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REQUIRED: Any = object()
"""Default of a key that has none."""


@dataclass(frozen=True)
class Key:
    """One key: its default, what it may hold and what it means.

    Attributes:
        default: Value when the key is missing, or REQUIRED.
        kind: "int", "float", "bool", "str", "ints", "floats", "strs", "any", or several joined by "|"; "null" among
            them allows null.
        meaning: One sentence for the reference page.
        choices: The only values allowed, if any.
    """

    default: Any
    kind: str
    meaning: str
    choices: tuple[Any, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with ``value``, or None."""
        kinds = self.kind.split("|")
        if not any(_is(value, kind) for kind in kinds):
            return f"found {value!r}, give {' or '.join(_NAMES[kind] for kind in kinds)}"
        if self.choices and value not in self.choices:
            from everyrank.errors import did_you_mean

            return f"found {value!r}, give one of {list(self.choices)}.{did_you_mean(value, self.choices)}"
        return None


_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "ints": "a list of whole numbers",
    "floats": "a list of numbers",
    "strs": "a list of texts",
    "null": "null",
    "any": "any value",
}


def _is(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind in ("ints", "floats", "strs"):
        return isinstance(value, list) and all(_is(item, kind[:-1]) for item in value)
    return True
