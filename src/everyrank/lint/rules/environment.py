"""Rules about what a launcher tells a program, and what the program makes of it: ER003, ER006, ER009."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator

from everyrank.lint.finding import Edit, Finding, Fix
from everyrank.lint.guards import rank_from_environment
from everyrank.lint.module import PythonModule, argument, constant, identifiers, keyword, values_given
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

_SPELLINGS = ("--local_rank", "--local-rank")
# Libraries that read LOCAL_RANK for the program.
_JOINS_ITSELF = {"everyrank", "accelerate", "lightning", "pytorch_lightning", "deepspeed", "transformers"}
_FIXED_METHOD = re.compile(r"tcp://(localhost|127\.0\.0\.1):[1-9]\d*$")
_LOCAL_ADDRESS = ("localhost", "127.0.0.1", "0.0.0.0")


def local_rank_option(program: Program) -> Iterator[Finding]:
    """The option for the local rank has one spelling only, is required, or does not know LOCAL_RANK.

    Finds: `add_argument("--local_rank")` without `--local-rank` (or the other way round), one with `required=True`, and
    one whose default does not read `LOCAL_RANK` in a file that reads it nowhere else.

    Why it hurts: `torch.distributed.launch` passes `--local-rank` since torch 2.0 and passed `--local_rank` before;
    torchrun and every scheduler pass nothing and set `LOCAL_RANK`. With one spelling the program ends with
    "unrecognized arguments"; with a constant default all ranks of a node take the same GPU.

    The change: Accept both spellings, and take the default from `LOCAL_RANK`. The destination stays `local_rank`.

    Before:

        import argparse
        import os

        parser = argparse.ArgumentParser()
        parser.add_argument("--local_rank", type=int, default=0)

    After:

        import argparse
        import os

        parser = argparse.ArgumentParser()
        parser.add_argument("--local_rank", "--local-rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)))
    """
    module = program.module
    options = [(call, name) for call, name in module.calls if name.endswith((".add_argument", ".add_arg"))]
    given = {constant(value) for call, _ in options for value in call.args}
    imported = {name.split(".")[0] for name in module.imports.values()}
    strings = {constant(node) for node in module.of_type(ast.Constant)}
    knows = _JOINS_ITSELF & imported or "LOCAL_RANK" in program.variables_read | strings
    for call, _ in options:
        names = [value for value in call.args if constant(value) in _SPELLINGS]
        if not names:
            continue
        edits, faults = [], []
        if missing := next((s for s in _SPELLINGS if s not in given), None):
            faults.append(f"it is not known as {missing}")
            quote, end = module.source(names[-1])[0], module.span(names[-1])[1]
            edits.append(Edit(end, end, f", {quote}{missing}{quote}"))
        required = keyword(call, "required") if constant(argument(call, "required")) is True else None
        if required:
            faults.append("it is required, and torchrun passes none")
        elif not knows:
            faults.append("its default does not read LOCAL_RANK, which is all that torchrun sets")
        if required or not knows:
            new = _default_edits(module, call, required)
            edits = [*edits, *new] if new else []
        if faults:
            yield module.finding(
                "ER003",
                call,
                f"The option for the local rank does not work under every launcher: {'; '.join(faults)}. "
                "Fix: accept both spellings and take the default from LOCAL_RANK.",
                Fix("Accept both spellings, with LOCAL_RANK for the default", tuple(edits)) if edits else None,
            )


def _default_edits(module: PythonModule, call: ast.Call, required: ast.keyword | None) -> list[Edit]:
    """Return the edits that make LOCAL_RANK the default; none where what is written is not a plain number."""
    name, imports = module.name_for("os")
    default = keyword(call, "default")
    if default and (required or not isinstance(constant(default.value), int)):
        return []
    old = module.source(default.value) if default else "0"
    text = f'default=int({name}.environ.get("LOCAL_RANK", {old}))'
    if place := required or default:
        return [module.replace(place, text), *imports]
    last = max(values_given(call), key=lambda node: module.span(node)[1])
    if last in call.args or not keyword(call, "type"):
        return []
    end = module.span(last)[1]
    return [Edit(end, end, f", {text}"), *imports]


def rendezvous_in_code(program: Program) -> Iterator[Finding]:
    """The address or port at which ranks meet is set in code, over what the launcher said.

    Finds: `os.environ["MASTER_PORT"] = "29500"`, and `MASTER_ADDR` set to this machine, without a look at whether the
    launcher has set them; `init_method="tcp://localhost:23456"`.

    Why it hurts: The second run on a machine ends with "address already in use". Under a launcher the ranks no longer
    meet where it listens, and with two nodes each meets itself.

    The change: `os.environ.setdefault`, which leaves a launcher's word alone; `init_method="env://"`.

    Before:

        import os
        import torch.distributed as dist

        def setup(rank, world_size):
            os.environ["MASTER_ADDR"] = "localhost"
            os.environ["MASTER_PORT"] = "12355"
            dist.init_process_group("gloo", rank=rank, world_size=world_size)

    After:

        import os
        import torch.distributed as dist

        def setup(rank, world_size):
            os.environ.setdefault("MASTER_ADDR", "localhost")
            os.environ.setdefault("MASTER_PORT", "12355")
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
    """
    module = program.module
    for node in module.of_type(ast.Assign):
        target, value = node.targets[0], constant(node.value)
        variable = rank_from_environment(module, target)
        if not isinstance(target, ast.Subscript) or variable not in ("MASTER_ADDR", "MASTER_PORT"):
            continue
        if not isinstance(value, str | int) or _depends_on_environment(program, node):
            continue
        if variable == "MASTER_ADDR" and (value not in _LOCAL_ADDRESS or _is_one_node(program, node)):
            continue
        text = f"{module.source(target.value)}.setdefault({module.source(target.slice)}, {module.source(node.value)})"
        yield module.finding(
            "ER006",
            node,
            f"{variable} is set in code, over what the launcher said"
            + ("; a second run on this machine finds the port taken." if variable == "MASTER_PORT" else ".")
            + " Fix: os.environ.setdefault.",
            Fix("Leave a launcher's word alone", (module.replace(node, text),)),
        )
    for call in program.joins:
        method = argument(call, "init_method", 1)
        if method is not None and _FIXED_METHOD.match(str(constant(method))):
            yield module.finding(
                "ER006",
                method,
                f"The ranks meet at {constant(method)}, fixed in code: only one run on a machine, and only one node. "
                'Fix: init_method="env://", and let the launcher choose.',
                Fix("Meet where the launcher says", (module.replace(method, '"env://"'),), safe=False),
            )


def _is_one_node(program: Program, node: ast.stmt) -> bool:
    """Whether all ranks are on this machine anyway: the file starts them, or makes a world of one."""
    block = program.module.block_of(node)
    variables = {rank_from_environment(program.module, t) for s in block for t in getattr(s, "targets", [])}
    return "WORLD_SIZE" in variables or (program.starts_ranks and not re.search(r"n_?nodes|nodes", program.module.text))


def _depends_on_environment(program: Program, node: ast.AST) -> bool:
    """Whether an assignment is made only where the launcher has set nothing, or for one launcher of several."""
    for parent in program.module.ancestors(node):
        if isinstance(parent, ast.If) and re.search(
            r"environ|getenv|MASTER|port|slurm|launcher|distributed", ast.unparse(parent.test), re.I
        ):
            return True
        if isinstance(parent, ast.ExceptHandler):
            return True
        if isinstance(parent, ast.FunctionDef) and parent.name.startswith("test"):
            return True
    return False


def rank_without_fallback(program: Program) -> Iterator[Finding]:
    """A launcher's variable is read without a fallback for one process.

    Finds: `os.environ["RANK"]`, `["LOCAL_RANK"]` or `["WORLD_SIZE"]` on the way of every start, with no look at whether
    it is set.

    Why it hurts: `python train.py` ends with `KeyError: 'RANK'`: no debugger, no profiler, no quick try without a
    launcher.

    The change: `os.environ.get("RANK", "0")`: one process is rank 0 of 1.

    Before:

        import os
        import torch.distributed as dist

        rank = int(os.environ["RANK"])
        if rank == 0:
            print("hello")

    After:

        import os
        import torch.distributed as dist

        rank = int(os.environ.get("RANK", "0"))
        if rank == 0:
            print("hello")
    """
    module = program.module
    fallback = {"RANK": '"0"', "LOCAL_RANK": '"0"', "WORLD_SIZE": '"1"'}
    for node in module.of_type(ast.Subscript):
        variable = rank_from_environment(module, node)
        if variable not in fallback or not isinstance(node.ctx, ast.Load):
            continue
        if _looks_first(program, node) or not program.guards.runs_on_every_rank(node) or _in_test(program, node):
            continue
        text = f"{module.source(node.value)}.get({module.source(node.slice)}, {fallback[variable]})"
        yield module.finding(
            "ER009",
            node,
            f"{variable} is not set without a launcher: python alone ends with a KeyError here. "
            f"Fix: os.environ.get({variable!r}, {fallback[variable]}).",
            Fix("Be rank 0 of 1 without a launcher", (module.replace(node, text),)),
        )


def _looks_first(program: Program, node: ast.AST) -> bool:
    """Whether the file looks somewhere whether the variables are set, or catches that they are not."""
    module = program.module
    if any(isinstance(parent, ast.Try) for parent in module.ancestors(node)):
        return True
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    looks: list[ast.AST] = [c for c in module.of_type(ast.Compare) if isinstance(c.ops[0], ast.In | ast.NotIn)]
    looks += [call for call, name in module.calls if name.endswith("environ.setdefault")]
    if any(names & set(identifiers(node)) for node in looks):
        return True
    sets = [t for a in module.of_type(ast.Assign) for t in a.targets if isinstance(t, ast.Subscript)]
    return any(rank_from_environment(module, target) in names for target in sets)


def _in_test(program: Program, node: ast.AST) -> bool:
    function = program.module.function_of(node)
    return os.path.basename(program.module.path).startswith("test_") or (
        function is not None and function.name.startswith("test")
    )


RULES = (
    Rule("ER003", "local-rank-option", {"python": local_rank_option}, fixes="safe"),
    Rule("ER006", "rendezvous-in-code", {"python": rendezvous_in_code}, fixes="safe"),
    Rule("ER009", "rank-without-fallback", {"python": rank_without_fallback}, fixes="safe"),
)
