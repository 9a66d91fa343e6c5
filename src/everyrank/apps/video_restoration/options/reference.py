"""The reference page of all option keys, written from the schema."""

from __future__ import annotations

from everyrank import reference_page
from everyrank.apps.video_restoration.options.keys import DATASET_TYPES, Options

_HEAD = """\
Option files are JSON with `//` comments; commas left over where a line was commented out do no harm. Unknown keys are
refused with the nearest known name, for a misspelt key would be a setting that silently does nothing. Keys of older
code that mean nothing here are known too: they are ignored, and the log says so. The resolved `options.json` that a run
leaves is itself an option file.

This page is written from the schema by `python -m everyrank.apps.video_restoration.options.reference`.

Samples of each `dataset_type`:

| `dataset_type` | samples |
| --- | --- |
"""


def page() -> str:
    """Return the reference page as Markdown."""
    kinds = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in DATASET_TYPES.items())
    return reference_page(Options, title="Options of video restoration", introduction=_HEAD + kinds)


if __name__ == "__main__":
    print(page(), end="")
