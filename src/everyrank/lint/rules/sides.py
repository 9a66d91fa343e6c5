"""Rules about what only some ranks do while the others wait: ER411 to ER413."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Finding
from everyrank.lint.module import last_name
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

# Models with buffers: BatchNorm, and the libraries and architectures that have it.
_BUFFERS = re.compile(
    r"(?<!keep_)batch_?norm|resnet|resnext|mobilenet|efficientnet|densenet|torchvision|timm\b|\bmodels\.__dict__", re.I
)
_WHO = {"zero": "rank 0 alone", "others": "every rank but 0"}


def collective_on_some_ranks(program: Program) -> Iterator[Finding]:
    """A collective is called by some of the ranks only.

    Finds: A collective or barrier of `torch.distributed` under `if rank == 0` (or behind `if rank != 0: return`),
    also in a function of the file that is called there. Where the other ranks have the same collective in the other
    branch, or a process group is named, nothing is reported.

    Why it hurts: The ranks that are kept out never come, and the others wait until the timeout, half an hour later,
    with a message that names neither.

    The change: Call it on every rank, outside of the condition.

    Before:

        import torch.distributed as dist

        def report(loss):
            if dist.get_rank() == 0:
                dist.all_reduce(loss)
                print(loss)

    After:

        import torch.distributed as dist

        def report(loss):
            dist.all_reduce(loss)
            if dist.get_rank() == 0:
                print(loss)
    """
    module = program.module
    for call, name in module.calls:
        collective = program.collective_in(call, name)
        if not collective:
            continue
        kept = program.guards.some_ranks_only(call)
        if kept is None or _has_counterpart(program, call, collective, kept[1]):
            continue
        statement, who = kept
        through = "" if program.is_collective(call, name) else f" (through {last_name(name)}())"
        yield module.finding(
            "ER411",
            call,
            f"{collective}{through} is called by {_WHO[who]} (line {statement.lineno}): it waits for the others, "
            "who never come. Fix: call it on every rank, outside of the condition.",
        )


def _has_counterpart(program: Program, call: ast.Call, collective: str, who: str) -> bool:
    """Whether the other ranks call the same collective elsewhere in the function, so that all of them meet."""
    module = program.module
    function = module.function_of(call)
    branch = program.guards.some_ranks_only(call)
    if branch is not None and isinstance(branch[0], ast.If) and branch[0].orelse:
        body, orelse = _all(branch[0].body), _all(branch[0].orelse)
        opposite = orelse if call in body else body
        if any(c in opposite and program.collective_in(c, name) == collective for c, name in module.calls):
            return True
    for other, name in module.calls:
        if other is not call and module.function_of(other) is function:
            kept = program.guards.some_ranks_only(other)
            if kept is not None and kept[1] != who and program.collective_in(other, name) == collective:
                return True
    return False


def wrapped_model_on_some_ranks(program: Program) -> Iterator[Finding]:
    """A wrapped model is run by rank 0 alone.

    Finds: A call of a DistributedDataParallel model under `if rank == 0`, itself or in a function of the file that is
    given the model there, such as a validation on rank 0. Only in files that name BatchNorm, or a family of models that
    has it.

    Why it hurts: DistributedDataParallel sends its buffers (those of BatchNorm) in every forward pass, and waits in it
    for the other ranks. Those stand at their next collective meanwhile, and both may wait for ever.

    The change: Give the bare model, `model.module`, and let the others wait at a barrier; or validate on every rank and
    reduce.

    Before:

        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def validate(model, loader):
            return sum(model(batch) for batch in loader)

        def train(net, loader):
            model = DistributedDataParallel(torch.nn.Sequential(net, torch.nn.BatchNorm1d(8)))
            if dist.get_rank() == 0:
                validate(model, loader)

    After:

        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def validate(model, loader):
            return sum(model(batch) for batch in loader)

        def train(net, loader):
            model = DistributedDataParallel(torch.nn.Sequential(net, torch.nn.BatchNorm1d(8)))
            if dist.get_rank() == 0:
                validate(model.module, loader)
    """
    module = program.module
    if not _BUFFERS.search(module.text):
        return  # without buffers the forward pass waits for nobody
    runs = _functions_that_run(program)
    for call, name in module.calls:
        kept = program.guards.some_ranks_only(call)
        if kept is None or _in_both_branches(program, call, name, kept[0]):
            continue
        positions = runs.get(name, set())
        given = [*enumerate(call.args), *((k.arg, k.value) for k in call.keywords)]
        run = [name, *(module.dotted(value) for position, value in given if position in positions)]
        models = [model for model in run if _wrapped_before(program, model, call)]
        if models:
            yield module.finding(
                "ER412",
                call,
                f"{models[-1]} is wrapped, and {_WHO[kept[1]]} runs it (line {kept[0].lineno}): its forward pass waits "
                f"for the other ranks. Fix: give {models[-1]}.module.",
            )


def _in_both_branches(program: Program, call: ast.Call, name: str, statement: ast.stmt) -> bool:
    """Whether the other ranks call the same in the other branch."""
    if not isinstance(statement, ast.If) or not statement.orelse:
        return False
    body, orelse = _all(statement.body), _all(statement.orelse)
    other = orelse if call in body else body
    return any(n == name and c in other for c, n in program.module.calls)


def _wrapped_before(program: Program, name: str, node: ast.expr) -> bool:
    function, wraps = program.module.function_of(node), program.wrapped_names.get(name, [])
    return any(program.module.function_of(w) is function and w.lineno < node.lineno for w in wraps)


def _functions_that_run(program: Program) -> dict[str, set[int | str | None]]:
    """For each function of the file, its parameters that it calls (by position and by name)."""
    found: dict[str, set[int | str | None]] = {}
    module = program.module
    for function in module.functions:
        parameters = [a.arg for a in [*function.args.posonlyargs, *function.args.args]]
        for node in module.within(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in parameters:
                found.setdefault(function.name, set()).update({parameters.index(node.func.id), node.func.id})
    return found


def left_by_some_ranks(program: Program) -> Iterator[Finding]:
    """Some ranks leave a loop or a function in which the others meet.

    Finds: `break`, `continue` or `return` under `if rank == 0` in a loop, or before code, that has a collective or a
    backward pass of a wrapped model.

    Why it hurts: Early stopping on rank 0: it is gone, and the others wait in the next step for its gradients.

    The change: Decide on one rank, send the decision to all (`everyrank.broadcast_decision`, `dist.broadcast`), and
    leave together.

    Before:

        import torch.distributed as dist

        def train(step, patience):
            for epoch in range(9):
                loss = step()
                dist.all_reduce(loss)
                if dist.get_rank() == 0:
                    if loss < patience:
                        break

    After:

        import torch
        import torch.distributed as dist

        def train(step, patience):
            for epoch in range(9):
                loss = step()
                dist.all_reduce(loss)
                stop = (loss < patience).float()
                dist.broadcast(stop, src=0)
                if stop:
                    break
    """
    module = program.module
    for node in (*module.of_type(ast.Break), *module.of_type(ast.Continue), *module.of_type(ast.Return)):
        kept = program.guards.some_ranks_only(node)
        if kept is None:
            continue
        statement, who = kept
        meeting = _met_without(program, node, statement)
        if meeting and not _others_leave_too(program, node, statement):
            yield module.finding(
                "ER413",
                node,
                f"{type(node).__name__.lower()} on {_WHO[who].removesuffix(' alone')} only (line {statement.lineno}): "
                f"the others go on to {meeting}, and wait there. "
                "Fix: decide on one rank, broadcast it, and leave together.",
            )


def _met_without(program: Program, node: ast.stmt, statement: ast.stmt) -> str:
    """Return what the other ranks still come to, after some left at ``node``; "" if nothing."""
    module = program.module
    function = module.function_of(node)
    if isinstance(node, ast.Return):
        if function is None or function not in program.guards.open_functions:
            return ""
        place: ast.AST | None = function
    else:
        place = next((p for p in module.ancestors(node) if isinstance(p, ast.For | ast.While)), None)
        if place is None or statement not in set(ast.walk(place)):
            return ""
    loops = {p for p in module.ancestors(node) if isinstance(p, ast.For | ast.While)}
    for call, name in module.calls:
        chain = set(module.ancestors(call))
        if place not in chain or module.function_of(call) is not function or program.guards.some_ranks_only(call):
            continue
        later = call.lineno > (node.end_lineno or 0)
        again = isinstance(node, ast.Break | ast.Return) and bool(loops & chain)
        if (isinstance(node, ast.Break) and not again) or not (later or again):
            continue
        if collective := program.collective_in(call, name):
            return f"{collective} (line {call.lineno})"
        if name.endswith(".backward") and program.wraps:
            return f"backward (line {call.lineno})"
    return ""


def _others_leave_too(program: Program, node: ast.stmt, statement: ast.stmt) -> bool:
    """Whether the other ranks leave as well: in the other branch, or by a decision that they receive."""
    module = program.module
    if isinstance(statement, ast.If) and any(
        isinstance(n, type(node))
        for other in (statement.body, statement.orelse)
        if node not in _all(other)
        for s in other
        for n in ast.walk(s)
    ):
        return True
    return any(
        isinstance(other, type(node))
        and other is not node
        and re.search(r"stop|exit|flag", _test_of(program, other), re.I)
        and module.function_of(other) is module.function_of(node)
        for other in module.of_type(type(node))
    )


def _all(block: list[ast.stmt]) -> set[ast.AST]:
    return {n for statement in block for n in ast.walk(statement)}


def _test_of(program: Program, node: ast.AST) -> str:
    parent = program.module.parents[node]
    return ast.unparse(parent.test) if isinstance(parent, ast.If) else ""


RULES = (
    Rule("ER411", "collective-on-some-ranks", {"python": collective_on_some_ranks}),
    Rule("ER412", "wrapped-model-on-some-ranks", {"python": wrapped_model_on_some_ranks}),
    Rule("ER413", "left-by-some-ranks", {"python": left_by_some_ranks}),
)
