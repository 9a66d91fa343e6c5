"""YAML of plain values. What reads and writes it is written in C where PyYAML came with that: six times as quick."""

from __future__ import annotations

from typing import Any, TextIO

import yaml

LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER: type[yaml.SafeDumper] = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load(text: str | TextIO) -> Any:
    """Return the values of one YAML document.

    Raises:
        yaml.YAMLError: It is none, or has a tag.
    """
    return yaml.load(text, LOADER)


def dump(value: Any) -> str:
    """Return a value of mappings, lists, text, numbers and None as YAML; the keys keep their order."""
    return yaml.dump(value, Dumper=DUMPER, sort_keys=False, allow_unicode=True)
