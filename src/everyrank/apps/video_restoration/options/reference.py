"""The reference page of all option keys, made of the tables that the loader checks against."""

from __future__ import annotations

import json
from collections.abc import Mapping

from everyrank.apps.video_restoration.options.key import REQUIRED, Key
from everyrank.apps.video_restoration.options.keys import (
    DATASET_TYPES,
    NET_G,
    PATH,
    TEST_DATA,
    TOP,
    TRAIN,
    TRAIN_DATA,
    VAL,
)

_HEAD = """# Options of video restoration

Option files are JSON with `//` comments; commas left over where a line was commented out do no harm. Unknown keys are
refused with the nearest known name, for a misspelt key would be a setting that silently does nothing. Keys of older
code that mean nothing here are known too: they are ignored, and the log says so. The resolved `options.json` that a run
leaves is itself an option file.

This page is made by `python -m everyrank.apps.video_restoration.options.reference` from the tables that the loader
checks against.
"""


def page() -> str:
    """Return the reference page as Markdown."""
    parts = [_HEAD]
    for title, keys in (
        ("Top level", TOP),
        ("`path`", PATH),
        ("`datasets.train`", TRAIN_DATA),
        ("`datasets.test`", TEST_DATA),
        ("`netG`", NET_G),
        ("`train`", TRAIN),
        ("`val`", VAL),
    ):
        parts.append(f"## {title}\n\n{_table(keys)}")
    rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in DATASET_TYPES.items())
    parts.append(f"## Dataset types\n\n| `dataset_type` | samples |\n|---|---|\n{rows}\n")
    return "\n".join(parts)


def _table(keys: Mapping[str, Key]) -> str:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, key in keys.items():
        default = "required" if key.default is REQUIRED else f"`{json.dumps(key.default)}`"
        choices = f" One of {', '.join(f'`{json.dumps(c)}`' for c in key.choices)}." if key.choices else ""
        rows.append(f"| `{name}` | {default} | {key.meaning}{choices} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(page(), end="")
