"""Notebooks: their code cells as one module, and the way back into the JSON with every other character as it was."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from everyrank.lint.options import Scalar, read_json

# A magic or a shell line with the lines it is continued on, "x = !command", and a question such as "torch.load?".
_MAGIC = re.compile(r"^[ \t]*((?:[%!?]|[\w, ]+ = *[%!])(?:.*\\\n)*.*|[\w.]+\?{1,2}[ \t]*)$", re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """A code cell: its number in the notebook (from 1), its text, and where its source lies in the file."""

    number: int
    text: str
    start: int
    end: int
    as_list: bool


def read_cells(text: str) -> list[Cell]:
    """Return the code cells of a notebook in Python.

    Raises:
        ValueError: The file is no notebook.
    """
    content = json.loads(text)
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list):
        raise ValueError("it has no list of cells")
    language = str(content.get("metadata", {}).get("kernelspec", {}).get("language", "python"))
    if language.lower() != "python":
        return []
    sources: dict[int, list[Scalar]] = {}
    for scalar in read_json(text, "").scalars:
        if scalar.keys[0] == "cells" and scalar.keys[2:3] == ("source",):
            sources.setdefault(int(scalar.keys[1]), []).append(scalar)
    found = []
    for number, cell in enumerate(cells):
        if cell.get("cell_type") == "code" and (scalars := sources.get(number)):
            source = "".join(s.value for s in scalars)
            if not source.lstrip().startswith("%%") or source.lstrip().startswith(("%%time", "%%capture")):
                found.append(Cell(number + 1, source, scalars[0].start, scalars[-1].end, len(scalars[0].keys) > 3))
    return found


def without_magics(text: str) -> str:
    """Return a cell with its magics and shell lines turned into comments or ``pass`` of the same length."""

    def plain(match: re.Match[str]) -> str:
        line = match[1]
        if len(line.split("\n")[0]) < 4:
            return re.sub(r"[^\n]", "#", match[0])
        blank = re.sub(r"[^\n]", " ", line)
        return match[0][: -len(line)] + "pass" + blank[4:]

    return _MAGIC.sub(plain, text)


def shell_lines(text: str) -> list[tuple[int, str]]:
    """Return the shell commands of a cell (``!python ...``) with their offsets."""
    return [(m.start(1) + 1, m[1][1:]) for m in _MAGIC.finditer(text) if m[1].startswith("!")]


def put_back(text: str, cells: list[Cell], new_texts: list[str]) -> str:
    """Return the notebook with new texts of cells; only the sources that changed are written anew."""
    for cell, new in sorted(zip(cells, new_texts, strict=True), key=lambda pair: -pair[0].start):
        if new == cell.text:
            continue
        if cell.as_list:
            begin = text.rindex("\n", 0, cell.start) + 1 if "\n" in text[: cell.start] else cell.start
            blanks = text[begin : cell.start]
            between = f",\n{blanks}" if begin and not blanks.strip() else ", "
            source = between.join(json.dumps(line, ensure_ascii=False) for line in new.splitlines(keepends=True))
        else:
            source = json.dumps(new, ensure_ascii=False)
        text = text[: cell.start] + source + text[cell.end :]
    return text
