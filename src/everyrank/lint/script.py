"""Shell text as the rules see it: its commands, word by word, with their places.

tree-sitter reads it, which goes on behind what it cannot read. It counts in bytes; here characters are counted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from everyrank.errors import UserError

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

_ToCharacter = Callable[[int], int]
_SBATCH = re.compile(r"^#SBATCH[ \t]+(.*?)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Word:
    """One word of a command; ``text`` is as written but for quotes around the whole."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Command:
    """A simple command: its words, and the variables set for it alone (``A=1 python ...``)."""

    words: tuple[Word, ...]
    variables: tuple[Word, ...] = ()


@dataclass
class Script:
    """Shell text.

    Attributes:
        text: The text.
        path: The file that holds it.
        whole: It is a file of its own, which must parse; not a piece of a page or of an option file.
    """

    text: str
    path: str = ""
    whole: bool = True
    commands: list[Command] = field(default_factory=list)
    assignments: list[Word] = field(default_factory=list)
    error: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        data = self.text.encode()
        tree = _parser().parse(data)
        to_character = _offsets(self.text, data)
        for node in _walk(tree.root_node):
            if node.type == "command":
                self._add_command(node, data, to_character)
            elif node.type == "variable_assignment" and (node.parent is None or node.parent.type != "command"):
                self.assignments.append(_word(node, data, to_character))
            elif (node.type == "ERROR" or node.is_missing) and self.error is None:
                self.error = (to_character(node.start_byte), to_character(node.end_byte))

    def _add_command(self, node: Node, data: bytes, to_character: _ToCharacter) -> None:
        words, variables = [], []
        for child in node.children:
            if child.type == "variable_assignment":
                variables.append(_word(child, data, to_character))
            elif child.type not in ("file_redirect", "heredoc_redirect", "herestring_redirect", "comment"):
                words.append(_word(child, data, to_character))
        self.commands.append(Command(tuple(words), tuple(variables)))

    @functools.cached_property
    def slurm_options(self) -> dict[str, str]:
        """Options of the ``#SBATCH`` lines by their long names, such as ``ntasks-per-node``."""
        found: dict[str, str] = {}
        short = {"N": "nodes", "n": "ntasks"}
        for match in _SBATCH.finditer(self.text):
            option = re.match(r"--?([\w-]+)(?:[=\s]+(\S+))?", match[1])
            if option:
                found[short.get(option[1], option[1])] = option[2] or ""
        return found


def _offsets(text: str, data: bytes) -> _ToCharacter:
    if len(text) == len(data):
        return lambda offset: offset
    return lambda offset: len(data[:offset].decode(errors="replace"))


def _word(node: Node, data: bytes, to_character: _ToCharacter) -> Word:
    text = data[node.start_byte : node.end_byte].decode(errors="replace")
    if node.type in ("string", "raw_string") and len(text) >= 2:
        text = text[1:-1]
    return Word(text, to_character(node.start_byte), to_character(node.end_byte))


def _walk(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack += reversed(current.children)


@functools.cache
def _parser() -> Parser:
    try:
        import tree_sitter_bash
        from tree_sitter import Language, Parser
    except ImportError as error:
        raise UserError(
            f"everyrank check reads shell scripts with tree-sitter, and {error.name} is not installed. "
            "Fix: pip install tree-sitter tree-sitter-bash"
        ) from error
    return Parser(Language(tree_sitter_bash.language()))
