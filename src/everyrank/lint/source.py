"""Files: reading one, taking it apart into what rules look at, and writing it back."""

from __future__ import annotations

import io
import os
import re
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everyrank.errors import UserError
from everyrank.lint import notebook
from everyrank.lint.module import TRIGGER as PYTHON_TRIGGER
from everyrank.lint.module import PythonModule
from everyrank.lint.options import read_json, read_yaml
from everyrank.lint.program import Program
from everyrank.lint.script import Script

KIND_OF_SUFFIX = {
    ".py": "python",
    ".ipynb": "notebook",
    ".sh": "shell",
    ".bash": "shell",
    ".slurm": "shell",
    ".sbatch": "shell",
    ".json": "json",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".md": "page",
    ".rst": "page",
}
_BOM = b"\xef\xbb\xbf"
_LARGEST = 5_000_000  # bytes; larger ones are data
# Shell, pages and option files without one of these words are not even parsed.
_TRIGGER = re.compile(
    r"torch\.distributed|torchrun|MASTER_|find_unused_parameters|CUDA_VISIBLE_DEVICES|init_process|local_rank"
)
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*\2", re.MULTILINE | re.DOTALL)
_LITERAL = re.compile(
    r"^(?:\.\. code(?:-block)?:: *(?:bash|sh|shell|console)?|.*::)[ \t]*\n((?:[ \t]+[^\n]*\n|[ \t]*\n)+)", re.MULTILINE
)
_SHELL_FENCES = {"", "bash", "sh", "shell", "zsh", "console", "text", "shell_script"}


class DoesNotParse(Exception):
    """A file cannot be read as what it is; ``offset`` is where, if that is known."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass
class Source:
    """One file, decoded.

    Attributes:
        path: The file.
        kind: One of the values of ``KIND_OF_SUFFIX``.
        text: What the rules see: the file's text, or the code cells of a notebook one after another.
        cells: The code cells of a notebook.
    """

    path: str
    kind: str
    text: str
    encoding: str = "utf-8"
    has_bom: bool = False
    whole_text: str = ""
    cells: list[notebook.Cell] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[str, int, Any]]:
        """Yield what rules look at: the kind of part, its offset in ``text``, and the part itself.

        Raises:
            DoesNotParse: The file cannot be parsed.
        """
        if self.kind == "python":
            yield "python", 0, _program(self.text, self.path)
        elif self.kind == "notebook":
            yield from self._notebook_parts()
        elif not _TRIGGER.search(self.text):
            return
        elif self.kind == "shell":
            yield "shell", 0, Script(self.text, self.path)
        elif self.kind == "page":
            for offset, text in _shell_blocks(self.text):
                yield "shell", offset, Script(text, self.path, whole=False)
        else:
            try:
                options = (read_json if self.kind == "json" else read_yaml)(self.text, self.path)
            except ValueError as error:
                raise DoesNotParse(str(error)) from error
            yield "options", 0, options
            for offset, script in options.shell_parts():
                yield "shell", offset, script

    def _notebook_parts(self) -> Iterator[tuple[str, int, Any]]:
        if not PYTHON_TRIGGER.search(self.text) and not _TRIGGER.search(self.text):
            return  # cells hold more languages than Python; only those of interest must parse
        yield "python", 0, _program(notebook.without_magics(self.text), self.path)
        for offset, line in notebook.shell_lines(self.text):
            yield "shell", offset, Script(line, self.path, whole=False)

    def cell_at(self, offset: int) -> tuple[notebook.Cell | None, int]:
        """Return the cell that holds a character of ``text``, and the offset at which that cell begins there."""
        begin = 0
        for cell in self.cells:
            end = begin + len(cell.text) + len(_CELL_END)
            if offset < end:
                return cell, begin
            begin = end
        return None, 0

    def with_text(self, text: str) -> Source:
        """Return this file with another ``text``; cells keep their number."""
        if self.kind != "notebook":
            return Source(self.path, self.kind, text, self.encoding, self.has_bom, text)
        whole = notebook.put_back(self.whole_text, self.cells, text.split(_CELL_END)[: len(self.cells)])
        return read_text(self.path, self.kind, whole)

    def encoded(self) -> bytes:
        """Return the file's bytes."""
        return (_BOM if self.has_bom else b"") + self.whole_text.encode(self.encoding)


_CELL_END = "\n\f\n"  # between two cells: a blank line to Python, and no cell has one


def read(path: str) -> Source:
    """Read a file.

    Raises:
        DoesNotParse: It cannot be decoded, or is no notebook.
        UserError: It cannot be read at all.
    """
    kind = KIND_OF_SUFFIX.get(Path(path).suffix.lower(), "shell")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Fix: give files that you may read.") from error
    if kind != "python" and len(data) > _LARGEST:
        return Source(path, "page", "")
    has_bom = data.startswith(_BOM)
    encoding = "utf-8"
    try:
        if kind == "python":
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0].replace("utf-8-sig", "utf-8")
        text = data[len(_BOM) * has_bom :].decode(encoding)
    except (UnicodeDecodeError, SyntaxError, LookupError) as error:
        raise DoesNotParse(f"it cannot be decoded: {error}") from error
    source = read_text(path, kind, text)
    source.encoding, source.has_bom = encoding, has_bom
    return source


def read_text(path: str, kind: str, text: str) -> Source:
    """Make a source of a text; of a notebook the cells are taken out."""
    if kind != "notebook":
        return Source(path, kind, text, whole_text=text)
    try:
        cells = notebook.read_cells(text)
    except ValueError as error:
        raise DoesNotParse(f"it is no notebook: {error}") from error
    return Source(path, kind, "".join(c.text + _CELL_END for c in cells), whole_text=text, cells=cells)


def write(source: Source) -> None:
    """Write a file in place of the old one, in one step, with the old one's permissions."""
    target = os.path.realpath(source.path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".everyrank-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(source.encoded())
        os.chmod(temporary, os.stat(target).st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _program(text: str, path: str) -> Program:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stray backslash is no concern of ours
            return Program(PythonModule(text, path))
    except SyntaxError as error:
        rows = text.split("\n")
        row = min(max(error.lineno or 1, 1), len(rows))
        raise DoesNotParse(error.msg, sum(len(line) + 1 for line in rows[: row - 1])) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise DoesNotParse(str(error) or "it is nested too deeply") from error


def _shell_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yield the shell blocks of a page with their offsets."""
    for match in _FENCE.finditer(text):
        if match[3].lower() in _SHELL_FENCES:
            yield match.start(4), match[4]
    for match in _LITERAL.finditer(text):
        yield match.start(1), match[1]
