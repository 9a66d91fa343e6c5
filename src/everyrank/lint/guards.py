"""Which code runs on which ranks: the conditions around a node, and the functions of a file that lead to it.

Two questions with two kinds of answer. *May some condition keep the other ranks out?* is asked before a rule says
that every rank writes: any condition that mentions a rank counts. *Does this surely run on some ranks only?* is
asked before a rule says that a collective hangs: only comparisons that are known to differ between ranks count.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator

from everyrank.lint.module import FunctionNode, PythonModule, argument, constant, identifiers, last_name, values_given

Assignment = ast.Assign | ast.AnnAssign | ast.NamedExpr
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_RANK_WORD = re.compile(
    r"rank|master|main_?proc|is_?main|main_?worker|chief|primary|leader|is_?root|zero_?only|only_on|process_index|"
    r"process_id|procid|proc_id|local_process|worker_id|is_first|gpu$|gpu_?id|device_id|\bpid\b|on_main",
    re.IGNORECASE,
)
_MODE_WORD = re.compile(
    r"distrib|ddp|dist_|_dist$|^dist$|world_?size|launcher|multi_?gpu|multi_?process|n_?gpus?$|num_gpus?|parallel|slurm|"
    r"spawn|cluster|fsdp|deepspeed|horovod",
    re.IGNORECASE,
)
_RANK_NAME = re.compile(
    r"^_*(?:(?:global|local|node|my|ddp|dist|dp|data_parallel)_?)*rank$|^(?:get_)?(?:local_)?rank$", re.IGNORECASE
)
_MAIN_NAME = re.compile(
    r"^_*(?:is_?|on_?)?(?:global_?|local_?)?(?:main_process|master_process|main_proc|master|rank_?zero|rank_?0)(?:_process)?$|"
    r"^_*is_(?:global_|local_)?(?:main|root|chief|primary|first_rank|rank_?zero|rank_?0)$",
    re.IGNORECASE,
)
_LEAVING = (ast.Return, ast.Raise, ast.Continue, ast.Break)


class Guards:
    """Answers about one module; made once for each."""

    def __init__(self, module: PythonModule) -> None:
        self.module = module

    # -- conditions --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tainted(self) -> set[str]:
        """Names whose value depends on the rank or on whether the run is distributed: writer, is_best, device..."""
        names: set[str] = set()
        assigned: list[tuple[set[str], ast.AST]] = []
        of_type = self.module.of_type
        nodes: list[Assignment] = [*of_type(ast.Assign), *of_type(ast.AnnAssign), *of_type(ast.NamedExpr)]
        for node in nodes:
            found = {n for t in targets_of(node) for n in target_names(t)}
            if node.value is not None:
                assigned += [(found, value) for value in (node.value, self._nearest_test(node)) if value is not None]
        for _ in range(3):
            before = len(names)
            for found, value in assigned:
                # Of a call only its name counts: what it was given says little of what it returns.
                called = value.func if isinstance(value, ast.Call) else None
                if self._mentions(called or value, set() if called else names):
                    names |= found
            if len(names) == before:
                break
        return names

    def _nearest_test(self, node: ast.AST) -> ast.expr | None:
        for parent in self.module.ancestors(node):
            if isinstance(parent, ast.If):
                return parent.test
            if isinstance(parent, _FUNCTIONS):
                return None
        return None

    @staticmethod
    def _mentions(node: ast.AST, names: set[str]) -> bool:
        return any(_RANK_WORD.search(n) or _MODE_WORD.search(n) or n in names for n in identifiers(node) if len(n) < 60)

    def mentions_rank(self, test: ast.AST) -> bool:
        """Whether a condition may keep some ranks out, or holds for a run of one process only."""
        return self._mentions(test, self._tainted)

    def is_guarded(self, node: ast.AST) -> bool:
        """Whether a condition in the same function may keep other ranks away from ``node``."""
        child = node
        for parent in self.module.ancestors(node):
            if isinstance(parent, ast.If | ast.While) and child is not parent.test and self.mentions_rank(parent.test):
                return True
            if isinstance(parent, ast.IfExp) and child is not parent.test and self.mentions_rank(parent.test):
                return True
            if isinstance(parent, ast.BoolOp) and any(self.mentions_rank(v) for v in parent.values if v is not child):
                return True
            if isinstance(parent, ast.With) and any(self.mentions_rank(item.context_expr) for item in parent.items):
                return True
            if isinstance(parent, ast.Match) and self.mentions_rank(parent.subject):
                return True
            if isinstance(child, ast.stmt) and self._left_before(parent, child):
                return True
            if isinstance(parent, _FUNCTIONS):
                return any(self._mentions(d, set()) for d in parent.decorator_list)
            child = parent
        return False

    def _left_before(self, parent: ast.AST, statement: ast.stmt) -> bool:
        """Whether some ranks may have left the block by return, raise, continue or break before ``statement``."""
        return any(
            isinstance(earlier, ast.If) and self.mentions_rank(earlier.test) and _leaves(earlier.body)
            for earlier in self._before(parent, statement)
        )

    def _before(self, parent: ast.AST, statement: ast.stmt) -> Iterator[ast.stmt]:
        for field in ("body", "orelse", "finalbody"):
            block = getattr(parent, field, None)
            if isinstance(block, list) and statement in block:
                yield from block[: block.index(statement)]

    # -- reach -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def call_sites(self) -> dict[str, list[ast.AST]]:
        """For each function's name, the places that call it or hand it to somebody who will (mp.spawn, partial)."""
        sites: dict[str, list[ast.AST]] = defaultdict(list)
        names = {function.name for function in self.module.functions}
        for call, dotted in self.module.calls:
            name = last_name(dotted)
            if name in names:
                sites[name].append(call)
            for value in values_given(call):
                passed = last_name(self.module.dotted(value)) if isinstance(value, ast.Name | ast.Attribute) else ""
                if passed in names:
                    sites[passed].append(call)
        for function in self.module.functions:
            parent = self.module.parents[function]
            if isinstance(parent, ast.ClassDef) and function.name.startswith("__"):
                sites[function.name] += [c for c, dotted in self.module.calls if last_name(dotted) == parent.name]
        return sites

    @functools.cached_property
    def open_functions(self) -> set[FunctionNode]:
        """Functions that this file itself calls on every rank, as far as it shows."""
        reached: set[FunctionNode] = set()
        waiting = [f for f in self.module.functions if self._called_openly(f, reached)]
        while waiting:
            reached |= set(waiting)
            waiting = [f for f in self.module.functions if f not in reached and self._called_openly(f, reached)]
        return reached

    def _called_openly(self, function: FunctionNode, reached: set[FunctionNode]) -> bool:
        for site in self.call_sites.get(function.name, []):
            caller = self.module.function_of(site)
            if (caller is None or caller in reached) and caller is not function and not self.is_guarded(site):
                return True
        return False

    def runs_on_every_rank(self, node: ast.AST) -> bool:
        """Whether ``node`` is reached from the top of the file without any condition on the rank."""
        function = self.module.function_of(node)
        return (function is None or function in self.open_functions) and not self.is_guarded(node)

    # -- some ranks only ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _main_names(self) -> set[str]:
        """Names that hold a condition that differs between ranks, such as ``save = rank == 0``."""
        names: set[str] = set()
        values: dict[str, list[ast.expr]] = defaultdict(list)
        for node in self.module.of_type(ast.Assign):
            found = {n for t in node.targets for n in target_names(t)}
            for name in found:
                values[name].append(node.value)
            if self._sides(node.value, names):
                names |= found
        # One that is also assigned something else says nothing.
        return {name for name in names if all(self._sides(value, set()) for value in values[name])}

    def _sides(self, test: ast.AST, names: set[str] | None = None) -> str:
        """Return "zero" or "others" for the ranks on which a condition holds, or "" if all may agree on it."""
        known = self._main_names if names is None else names
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._sides(test.operand, names)
            if _is_rank(self.module, test.operand):
                return "zero"
            return {"zero": "others", "others": "zero"}.get(inner, "")
        if isinstance(test, ast.BoolOp):
            sides = [self._sides(value, names) for value in test.values]
            found = {side for side in sides if side}
            if isinstance(test.op, ast.And):
                if any(self._single_process(value) for value in test.values):
                    return ""
                return found.pop() if len(found) == 1 else ""
            open_ways = [
                v for v, side in zip(test.values, sides, strict=True) if not side and not self._single_process(v)
            ]
            return found.pop() if len(found) == 1 and not open_ways else ""
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            return self._compared(test)
        if isinstance(test, ast.Call):
            name = last_name(self.module.dotted(test.func))
            return "zero" if _MAIN_NAME.match(name) else ""
        if isinstance(test, ast.Name | ast.Attribute):
            name = last_name(self.module.dotted(test))
            return "zero" if _MAIN_NAME.match(name) or name in known else ""
        return ""

    def _compared(self, test: ast.Compare) -> str:
        left, op, right = test.left, test.ops[0], test.comparators[0]
        if _is_rank(self.module, right) and isinstance(op, ast.Eq | ast.NotEq):
            left, right = right, left
        if not _is_rank(self.module, left):
            return ""
        if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Tuple | ast.List | ast.Set):
            values = {constant(e) for e in right.elts}
            if values <= {-1, 0} and 0 in values:
                return "zero" if isinstance(op, ast.In) else "others"
            return ""
        if constant(right) != 0:
            return "zero" if isinstance(op, ast.Lt | ast.LtE) and constant(right) in (0, 1) else ""
        return {ast.Eq: "zero", ast.Is: "zero", ast.LtE: "zero", ast.NotEq: "others", ast.Gt: "others"}.get(
            type(op), ""
        )

    def _single_process(self, test: ast.AST) -> bool:
        """Whether a condition says that the run is not distributed."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return any(
                _MODE_WORD.search(n) or "initialized" in n or "available" in n for n in identifiers(test.operand)
            )
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.Is):
            return any(_MODE_WORD.search(n) for n in identifiers(test)) and constant(test.comparators[0]) in (
                1,
                None,
                False,
                "none",
            )
        return False

    def some_ranks_only(self, node: ast.AST) -> tuple[ast.stmt, str] | None:
        """Return the statement that keeps some ranks away from ``node`` in its function, and who runs it; or None."""
        child = node
        for parent in self.module.ancestors(node):
            if isinstance(parent, ast.If) and child is not parent.test:
                side = self._sides(parent.test)
                if side and child in parent.orelse:
                    side = {"zero": "others", "others": "zero"}[side]
                    if _is_compound(parent.test):
                        side = ""
                if side:
                    return parent, side
            if isinstance(child, ast.stmt):
                for earlier in self._before(parent, child):
                    if isinstance(earlier, ast.If) and not earlier.orelse and isinstance(earlier.body[-1], _LEAVING):
                        side = "" if _is_compound(earlier.test) else self._sides(earlier.test)
                        if side and not isinstance(earlier.body[-1], ast.Raise):
                            return earlier, {"zero": "others", "others": "zero"}[side]
            if isinstance(parent, (*_FUNCTIONS, ast.Lambda)):
                return None
            child = parent
        return None


def _is_compound(test: ast.AST) -> bool:
    return isinstance(test, ast.BoolOp) or (isinstance(test, ast.UnaryOp) and isinstance(test.operand, ast.BoolOp))


def _leaves(block: list[ast.stmt]) -> bool:
    return isinstance(block[-1], _LEAVING) or (
        isinstance(block[-1], ast.Expr)
        and isinstance(block[-1].value, ast.Call)
        and any(n in ("exit", "_exit") for n in identifiers(block[-1].value.func))
    )


def _is_rank(module: PythonModule, node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return bool(re.fullmatch(r"get_(?:global_|local_)?rank", last_name(module.dotted(node.func))))
    if isinstance(node, ast.Name | ast.Attribute):
        return bool(_RANK_NAME.match(last_name(module.dotted(node))))
    return False


def targets_of(node: Assignment) -> list[ast.expr]:
    """Return what an assignment assigns to."""
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def target_names(target: ast.AST) -> Iterator[str]:
    """Yield the names that an assignment to ``target`` sets."""
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Attribute):
        yield target.attr
    elif isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from target_names(element)


def rank_from_environment(module: PythonModule, node: ast.AST) -> str:
    """Return the variable that an expression reads (``RANK`` of ``os.environ["RANK"]`` or ``os.getenv("RANK")``)."""
    if isinstance(node, ast.Subscript) and module.dotted(node.value).endswith("environ"):
        value = constant(node.slice)
        return value if isinstance(value, str) else ""
    if isinstance(node, ast.Call):
        name = module.dotted(node.func)
        if name.endswith(("environ.get", "getenv", "environ.pop")):
            value = constant(argument(node, "key", 0))
            return value if isinstance(value, str) else ""
        if name in ("int", "str") and node.args:
            return rank_from_environment(module, node.args[0])
    return ""
