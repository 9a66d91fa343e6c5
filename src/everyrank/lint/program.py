"""What a Python file does with distributed training: it joins a group, wraps a model, reads a rank, starts ranks."""

from __future__ import annotations

import ast
import functools
import os
import re

from everyrank.lint.guards import Guards, rank_from_environment, target_names
from everyrank.lint.module import FunctionNode, PythonModule, argument, constant, last_name, values_given

_COLLECTIVES = """
    all_reduce all_gather all_gather_into_tensor all_gather_object all_to_all all_to_all_single barrier
    broadcast broadcast_object_list gather gather_object monitored_barrier reduce reduce_scatter
    reduce_scatter_tensor scatter scatter_object_list all_reduce_coalesced all_gather_coalesced new_group
"""
COLLECTIVES = frozenset(_COLLECTIVES.split())
_WRAPPER = re.compile(r"(?:^|\.)(?:DistributedDataParallel|DDP)$")
_SPAWN = re.compile(
    r"(?:^|\.)(?:spawn|start_processes|notebook_launcher)$|multiprocessing\.Process$|^Process$|^launch$"
)
_JOIN_HELPER = re.compile(
    r"^(?:init_?dist\w*|init_?distributed\w*|setup_?dist\w*|setup_?ddp|ddp_?setup|init_?ddp|initialize_distributed|"
    r"init_?process_?group\w*|setup_?distributed\w*|dist_?init\w*|distributed_init\w*)$"
)


class Program:
    """A module, and what it does with distributed training."""

    def __init__(self, module: PythonModule) -> None:
        self.module = module
        self.guards = Guards(module)

    @property
    def is_relevant(self) -> bool:
        """Whether any rule could find something here; a test does odd things on purpose."""
        name = os.path.basename(self.module.path)
        return self.module.is_relevant and not re.match(r"test_.*\.py$|.*_test\.py$|conftest\.py$", name)

    @functools.cached_property
    def joins(self) -> list[ast.Call]:
        """The calls of ``init_process_group``."""
        return [c for c, name in self.module.calls if last_name(name) == "init_process_group"]

    @functools.cached_property
    def joins_by_helper(self) -> bool:
        """Whether a helper is called that joins, by its name."""
        return any(_JOIN_HELPER.match(last_name(name)) for _, name in self.module.calls)

    @functools.cached_property
    def wraps(self) -> list[ast.Call]:
        """The calls of ``DistributedDataParallel``."""
        return [c for c, name in self.module.calls if _WRAPPER.search(name) and c.args + c.keywords]

    @functools.cached_property
    def starts_ranks(self) -> bool:
        """Whether the file starts its ranks itself (``mp.spawn``)."""
        return any(_SPAWN.search(name) and not name.startswith("subprocess") for _, name in self.module.calls)

    @functools.cached_property
    def functions_of_ranks(self) -> set[FunctionNode]:
        """The functions that run in the ranks which this file starts: those given to ``mp.spawn``, and their calls."""
        handed: set[str] = set()
        for call, name in self.module.calls:
            if _SPAWN.search(name):
                values = [v for v in values_given(call) if isinstance(v, ast.Name | ast.Attribute)]
                handed |= {last_name(self.module.dotted(v)) for v in values}
        found: set[FunctionNode] = set()
        names = handed
        while names:
            new = {f for f in self.module.functions if f.name in names} - found
            found |= new
            names = {last_name(n) for c, n in self.module.calls if self.module.function_of(c) in new}
        return found

    @functools.cached_property
    def variables_read(self) -> set[str]:
        """The variables of a launcher that are read from the environment."""
        found = {rank_from_environment(self.module, call) for call, _ in self.module.calls}
        found |= {rank_from_environment(self.module, node) for node in self.module.of_type(ast.Subscript)}
        return found & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK"}

    @functools.cached_property
    def is_distributed(self) -> bool:
        """Whether this file itself takes part in a distributed run: it joins a group or wraps a model."""
        return bool(self.joins or self.wraps or self.joins_by_helper)

    @functools.cached_property
    def is_entry(self) -> bool:
        """Whether the file is a program: it has a ``__main__`` part, or calls at its top."""
        tests = [statement.test for statement in self.module.tree.body if isinstance(statement, ast.If)]
        if any(isinstance(n, ast.Name) and n.id == "__name__" for test in tests for n in ast.walk(test)):
            return True
        return any(self.module.function_of(call) is None for call in self.joins)

    @functools.cached_property
    def wrapped_names(self) -> dict[str, list[ast.Assign]]:
        """Names (``model``, ``self.model``) that are assigned a wrapped model, with the assignments."""
        found: dict[str, list[ast.Assign]] = {}
        for node in self.module.of_type(ast.Assign):
            if isinstance(node.value, ast.Call) and node.value in self.wraps:
                for target in node.targets:
                    if name := self.module.dotted(target):
                        found.setdefault(name, []).append(node)
        return found

    def is_global_rank(self, node: ast.AST, depth: int = 0) -> bool:
        """Whether an expression surely is the global rank: ``dist.get_rank()``, ``os.environ["RANK"]``, or a name."""
        if rank_from_environment(self.module, node) in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
            return True
        if isinstance(node, ast.Call):
            name = self.module.dotted(node.func)
            return name == "torch.distributed.get_rank" or (
                name == "int" and bool(node.args) and self.is_global_rank(node.args[0])
            )
        if isinstance(node, ast.Name | ast.Attribute) and depth < 3:
            values = self.values_of(node)
            return bool(values) and all(self.is_global_rank(value, depth + 1) for value in values)
        return False

    def values_of(self, node: ast.expr) -> list[ast.expr]:
        """Return what a name is assigned in the function of ``node`` (an attribute: in the file)."""
        name = self.module.dotted(node)
        function = self.module.function_of(node)
        values = []
        for assign in self.module.of_type(ast.Assign):
            if isinstance(node, ast.Name) and self.module.function_of(assign) not in (function, None):
                continue
            for target in assign.targets:
                if self.module.dotted(target) == name:
                    values.append(assign.value)
                elif (
                    isinstance(target, ast.Tuple)
                    and isinstance(assign.value, ast.Tuple)
                    and len(target.elts) == len(assign.value.elts)
                ):
                    values += [
                        v for t, v in zip(target.elts, assign.value.elts, strict=True) if self.module.dotted(t) == name
                    ]
                elif isinstance(target, ast.Tuple) and any(self.module.dotted(t) == name for t in target.elts):
                    values.append(assign.value)
        if function is not None and isinstance(node, ast.Name):
            arguments = function.args
            parameters = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
            if name in parameters and not any(
                self.module.function_of(a) is function and any(name in target_names(t) for t in a.targets)
                for a in self.module.of_type(ast.Assign)
            ):
                return []
        return values

    def is_collective(self, call: ast.Call, name: str) -> bool:
        """Whether a call is one of ``torch.distributed``'s collectives over the whole world."""
        known = name.startswith("torch.distributed.") and last_name(name) in COLLECTIVES
        return known and argument(call, "group") is None

    @functools.cached_property
    def collective_functions(self) -> dict[str, tuple[FunctionNode, str]]:
        """Functions of this file that run a collective on every rank that calls them, with the collective's name."""
        found: dict[str, tuple[FunctionNode, str]] = {}
        counts: dict[str, int] = {}
        for function in self.module.functions:
            counts[function.name] = counts.get(function.name, 0) + 1
        for _ in range(4):
            before = len(found)
            for call, name in self.module.calls:
                caller = self.module.function_of(call)
                if caller is None or caller.name in found or counts[caller.name] > 1:
                    continue
                inner = found.get(last_name(name)) if self._is_own(call, name) else None
                if (
                    (self.is_collective(call, name) or inner)
                    and not self.guards.some_ranks_only(call)
                    and not self._may_skip(call)
                ):
                    found[caller.name] = (caller, inner[1] if inner else last_name(name))
            if len(found) == before:
                break
        return found

    def _is_own(self, call: ast.Call, name: str) -> bool:
        """Whether a call is of this file's own function: by its bare name, or as a method of self."""
        return "." not in name or (name.startswith("self.") and name.count(".") == 1)

    def _may_skip(self, call: ast.Call) -> bool:
        """Whether a collective stands under a condition that may hold on no rank (world size, an option)."""
        for parent in self.module.ancestors(call):
            if isinstance(parent, ast.If | ast.IfExp | ast.Try):
                names = ast.unparse(parent.test) if not isinstance(parent, ast.Try) else "try"
                if not re.search(r"is_initialized|is_available|world_size|distributed|ddp", names, re.IGNORECASE):
                    return True
            if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef):
                return False
        return False

    def collective_in(self, call: ast.Call, name: str) -> str:
        """Return the collective that a call runs, itself or through functions of the file; "" if none."""
        if self.is_collective(call, name):
            return last_name(name)
        inner = self.collective_functions.get(last_name(name)) if self._is_own(call, name) else None
        return inner[1] if inner else ""

    def has_backend(self, call: ast.Call, backend: str) -> bool:
        """Whether ``init_process_group`` is given this backend as a literal."""
        return constant(argument(call, "backend", 0)) == backend
