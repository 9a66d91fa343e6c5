"""A Python module as the rules see it: its tree with parents, the names it imports, its calls and functions."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

from everyrank.lint.finding import Edit, Finding, Fix, Lines

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NodeT = TypeVar("_NodeT", bound=ast.AST)

# A module without one of these words takes no part in distributed training; it is parsed, and no rule looks at it.
TRIGGER = re.compile(
    r"torch\.distributed|torch\.nn\.parallel|import distributed|init_process_group"
    r"|DistributedDataParallel|DistributedSampler"
    r"|local[-_]rank|LOCAL_RANK|WORLD_SIZE|MASTER_PORT|SLURM_PROCID|['\"]RANK['\"]|get_world_size|get_rank|DDP\b|rank_zero"
)


class PythonModule:
    """One parsed Python file (or the code cells of a notebook).

    Attributes:
        text: The source.
        path: Where it came from, for rules that look beside it.
    """

    def __init__(self, text: str, path: str = "") -> None:
        self.text = text
        self.path = path
        self.lines = Lines(text)
        self.tree = ast.parse(text)
        self.parents: dict[ast.AST, ast.AST] = {}
        self._by_type: dict[type[ast.AST], list[ast.AST]] = defaultdict(list)
        self.imports: dict[str, str] = {}
        self.import_nodes: list[ast.Import | ast.ImportFrom] = []
        if self.is_relevant:
            self.index()

    @functools.cached_property
    def is_relevant(self) -> bool:
        """Whether any rule could find something here."""
        return TRIGGER.search(self.text) is not None

    def index(self) -> None:
        """Note parents, kinds of nodes and imports; a module that is not relevant is not indexed by itself."""
        stack: list[ast.AST] = [self.tree]
        while stack:
            node = stack.pop()
            self._by_type[type(node)].append(node)
            children = list(ast.iter_child_nodes(node))
            for child in children:
                self.parents[child] = node
            stack += reversed(children)
            if isinstance(node, ast.Import):
                self.import_nodes.append(node)
                for alias in node.names:
                    self.imports[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                self.import_nodes.append(node)
                base = "." * node.level + (node.module or "")
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = f"{base}.{alias.name}"

    # -- nodes -------------------------------------------------------------------------------------------------------

    def of_type(self, kind: type[_NodeT]) -> list[_NodeT]:
        """Return every node of a kind, in the order of the text."""
        return self._by_type[kind]  # type: ignore[return-value]

    @functools.cached_property
    def calls(self) -> list[tuple[ast.Call, str]]:
        """Every call in the order of the text, with the dotted name of what is called ("" if it has none)."""
        return [(call, self.dotted(call.func)) for call in self.of_type(ast.Call)]

    @functools.cached_property
    def functions(self) -> list[FunctionNode]:
        """Every function and method."""
        return [*self.of_type(ast.FunctionDef), *self.of_type(ast.AsyncFunctionDef)]

    @functools.cached_property
    def names_used(self) -> set[str]:
        """Every identifier and attribute name that occurs."""
        return {n.id for n in self.of_type(ast.Name)} | {n.attr for n in self.of_type(ast.Attribute)}

    def dotted(self, node: ast.AST) -> str:
        """Return ``torch.distributed.all_reduce`` for such a chain of names, through the imports; "" for no chain."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            # Of get_model().to(...) only the last name is known.
            return f"?.{parts[0]}" if parts else ""
        parts.append(self.imports.get(node.id, node.id))
        return ".".join(reversed(parts))

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield the parents of a node, from the nearest."""
        while (parent := self.parents.get(node)) is not None:
            yield parent
            node = parent

    def function_of(self, node: ast.AST) -> FunctionNode | None:
        """Return the function whose body holds ``node``, or None at the level of the module (or of a class)."""
        for parent in self.ancestors(node):
            if isinstance(parent, _FUNCTIONS):
                return parent
        return None

    def statement_of(self, node: ast.AST) -> ast.stmt:
        """Return the statement that holds ``node``."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def block_of(self, statement: ast.stmt) -> list[ast.stmt]:
        """Return the list of statements in which ``statement`` stands."""
        parent = self.parents[statement]
        for field in ("body", "orelse", "finalbody", "handlers"):
            block = getattr(parent, field, None)
            if isinstance(block, list) and statement in block:
                return block
        for case in getattr(parent, "cases", []):
            if statement in case.body:
                return list(case.body)
        return [statement]

    def in_body(self, branch: ast.If, node: ast.AST) -> bool:
        """Whether ``node``, which stands somewhere below ``branch``, does so in its body and not in its else."""
        chain = [node, *self.ancestors(node)]
        return chain[chain.index(branch) - 1] in branch.body

    def within(self, function: FunctionNode | None) -> Iterator[ast.AST]:
        """Yield the nodes of a function's own body (None: of the module's), not of functions inside it."""
        stack: list[ast.AST] = list(reversed(function.body if function else self.tree.body))
        while stack:
            node = stack.pop()
            yield node
            if not isinstance(node, (*_FUNCTIONS, ast.Lambda)):
                stack += reversed(list(ast.iter_child_nodes(node)))

    # -- places and findings -----------------------------------------------------------------------------------------

    def offset(self, row: int, column: int) -> int:
        """Return the offset in the text of ast's row (from 1) and column (in bytes of UTF-8)."""
        begin = self.lines.starts[row - 1]
        line = self.text[begin : begin + column]
        if line.isascii():
            return begin + column
        return begin + len(self.lines.line(row).encode()[:column].decode())

    def span(self, node: ast.expr | ast.stmt | ast.keyword | ast.arg | ast.alias) -> tuple[int, int]:
        """Return the offsets of a node's first character and of the one past its last."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def source(self, node: ast.expr | ast.stmt | ast.keyword) -> str:
        """Return a node's own text."""
        start, end = self.span(node)
        return self.text[start:end]

    def finding(
        self, code: str, node: ast.expr | ast.stmt | ast.keyword, message: str, fix: Fix | None = None
    ) -> Finding:
        """Make a finding at a node; of a statement with a body only the first line is marked."""
        start, end = self.span(node)
        if hasattr(node, "body") and isinstance(node, ast.stmt):
            end = start + len(self.text[start:end].split("\n")[0].rstrip())
        return Finding(code, message, start, end, fix and self._within_string(node, fix))

    def _within_string(self, node: ast.AST, fix: Fix) -> Fix | None:
        """Return a fix as it can be written inside of an f-string, if it stands in one: with the other quotes."""
        string = next((p for p in self.ancestors(node) if isinstance(p, ast.JoinedStr)), None)
        if string is None:
            return fix
        try:  # before Python 3.12 the places of what is inside are not always right
            exact = isinstance(node, ast.expr) and ast.dump(ast.parse(self.source(node), mode="eval").body) == ast.dump(
                node
            )
        except SyntaxError:
            exact = False
        quote = re.sub(r"^\w*", "", self.source(string))[:1]
        other = "'" if quote == '"' else '"'
        if not exact or any(other in edit.text and quote in edit.text for edit in fix.edits):
            return None
        edits = tuple(Edit(edit.start, edit.end, edit.text.replace(quote, other)) for edit in fix.edits)
        return Fix(fix.message, edits, fix.safe)

    # -- edits -------------------------------------------------------------------------------------------------------

    def replace(self, node: ast.expr | ast.stmt | ast.keyword, text: str) -> Edit:
        """The edit that puts ``text`` in a node's place."""
        return Edit(*self.span(node), text)

    def insert_before(self, statement: ast.stmt, text: str) -> Edit:
        """The edit that puts the line(s) ``text`` before a statement that begins its line, at its indentation."""
        row = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        begin = self.lines.starts[row - 1]
        return Edit(begin, begin, "".join(f"{self.indent(statement)}{line}{self.newline}" for line in text.split("\n")))

    def indent(self, statement: ast.stmt) -> str:
        """Return the blanks before a statement."""
        line = self.lines.line(statement.lineno)
        return line[: len(line) - len(line.lstrip())]

    @property
    def newline(self) -> str:
        """How lines end here."""
        return "\r\n" if "\r\n" in self.text else "\n"

    def begins_line(self, statement: ast.stmt) -> bool:
        """Whether nothing but blanks stands before a statement on its line."""
        return not self.text[self.lines.starts[statement.lineno - 1] : self.span(statement)[0]].strip()

    def name_for(self, module: str) -> tuple[str, tuple[Edit, ...]]:
        """Return the name by which the top of this file knows ``module``, and the edit that imports it if it does not.

        ``module`` is ``os`` or ``torch.distributed`` (as ``dist``).
        """
        wanted = {"torch.distributed": ("dist", "import torch.distributed as dist")}.get(
            module, (module, f"import {module}")
        )
        for node in self.import_nodes:
            if self.parents[node] is not self.tree:
                continue
            for alias in node.names:
                name = alias.asname or alias.name
                full = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
                if full == module and (alias.asname or isinstance(node, ast.ImportFrom) or "." not in module):
                    return name, ()
                if isinstance(node, ast.Import) and full == module:
                    return module, ()
        return wanted[0], (self._import_edit(wanted[1]),)

    def _import_edit(self, line: str) -> Edit:
        body = self.tree.body
        first = 0
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            first = 1
        while first < len(body) and isinstance(body[first], ast.ImportFrom) and body[first].module == "__future__":  # type: ignore[attr-defined]
            first += 1
        if first < len(body) and self.begins_line(body[first]):
            return self.insert_before(body[first], line)
        end = len(self.text)
        return Edit(end, end, f"{line}{self.newline}")


def argument(call: ast.Call, name: str, position: int | None = None) -> ast.expr | None:
    """Return the value a call gives for a parameter, by keyword or position; None if it gives none."""
    if given := keyword(call, name):
        return given.value
    if position is not None and position < len(call.args):
        if any(isinstance(a, ast.Starred) for a in call.args[: position + 1]):
            return None
        return call.args[position]
    return None


def keyword(call: ast.Call, name: str) -> ast.keyword | None:
    """Return ``name=value`` of a call, or None."""
    return next((k for k in call.keywords if k.arg == name), None)


def values_given(call: ast.Call) -> list[ast.expr]:
    """Return what a call is given, by position and by keyword."""
    return [*call.args, *(k.value for k in call.keywords)]


def has_unknown_arguments(call: ast.Call) -> bool:
    """Whether a call passes on ``*args`` or ``**kwargs``, which may hold anything."""
    return any(k.arg is None for k in call.keywords) or any(isinstance(a, ast.Starred) for a in call.args)


def constant(node: ast.AST | None) -> object:
    """Return the value of a literal, also of a negative number; None for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        return -value if isinstance(value, int | float) else None
    return node.value if isinstance(node, ast.Constant) else None


def last_name(dotted: str) -> str:
    """Return the last part of a dotted name."""
    return dotted.rsplit(".", 1)[-1]


def identifiers(node: ast.AST) -> Iterator[str]:
    """Yield every identifier, attribute name and string in an expression."""
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
