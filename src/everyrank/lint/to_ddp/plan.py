"""What has to change in a program, place by place; found on its syntax tree, before anything is rewritten."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from everyrank.errors import UserError
from everyrank.lint.module import FunctionNode, PythonModule, argument, constant, last_name
from everyrank.lint.program import Program
from everyrank.lint.rules.model import OF_WRAPPER
from everyrank.lint.to_ddp import helpers

Span = tuple[int, int, int, int]  # first row and column, last row and column; rows from 1, columns from 0
_WRITES = re.compile(
    r"^(?:torch\.save|numpy\.save\w*|json\.dump|pickle\.dump|.*\.savefig|.*\.to_csv|wandb\.\w+|shutil\.copy\w*)$"
)
_WRITER = re.compile(r"(?:^|\.)SummaryWriter$")
_DRAWS = re.compile(
    r"^(?:torch\.(?:rand\w*|normal)|numpy\.random\.\w+|random\.\w+)$|(?:random_split|train_test_split)$"
)
_SEEDS = re.compile(r"\bmanual_seed\b|\bseed\(|\bseed_everything\b|\bset_seed\b|\bdefault_rng\(\w|\brandom_state\s*=")
_PER_STEP = ("forward", "__getitem__")  # where ranks are free to draw what they like
_OWN = frozenset({"join", "bare", "print0", "global_mean", "rank0_first", "RankLoader", "RankBatches", "RANK"})


@dataclass
class Plan:
    """The changes, by place.

    Attributes:
        expressions: New text for an expression.
        before: Statements to put before the statement that begins in a row.
        wrapped: The header under which the statement that begins in a row goes.
        comments: What the reader has to decide, before the statement that begins in a row.
        helpers: The helpers that the program needs.
        notes: What is not sure, for the terminal: row and sentence.
        entry: Row of ``if __name__ == "__main__":``, or None.
    """

    expressions: dict[Span, str] = field(default_factory=dict)
    before: dict[int, list[str]] = field(default_factory=dict)
    wrapped: dict[int, str] = field(default_factory=dict)
    comments: dict[int, list[str]] = field(default_factory=dict)
    helpers: list[str] = field(default_factory=lambda: [helpers.RANKS])
    notes: list[tuple[int, str]] = field(default_factory=list)
    entry: int | None = None

    def need(self, helper: str) -> None:
        """Add a helper once."""
        if helper not in self.helpers:
            self.helpers.append(helper)

    def unsure(self, row: int, sentence: str) -> None:
        """Leave a comment, and say so."""
        if sentence not in self.comments.setdefault(row, []):
            self.comments[row].append(sentence)
            self.notes.append((row, sentence))


def make_plan(module: PythonModule) -> Plan:
    """Find what has to change.

    Raises:
        UserError: The program is distributed already, or has no training loop of a known kind.
    """
    if not module.parents:  # a program on one device has none of the words that make a module worth indexing
        module.index()
    program = Program(module)
    if program.is_distributed or "torch.distributed" in module.imports.values():
        raise UserError(
            f"{module.path} takes part in distributed training already. "
            f"Fix: everyrank check {module.path} finds its mistakes."
        )
    if taken := sorted(_OWN & module.names_used):
        raise UserError(f"{module.path} uses the name {taken[0]} already. Fix: give it another name first.")
    loops = _training_loops(module)
    if not loops:
        raise UserError(
            f"{module.path} has no loop with a backward() over a loader, so there is nothing to change. "
            "Fix: give the file that holds the training loop."
        )
    plan = Plan()
    weights = _change_loaders(module, loops, plan)
    for loop, loader in loops:
        _change_loss(module, loop, weights.get(loader, ""), plan)
    _wrap_models(module, plan)
    _change_writes(module, plan)
    _change_devices(module, plan)
    _find_unseeded(module, [loop for loop, _ in loops], plan)
    _find_entry(module, plan)
    return plan


def span_of(module: PythonModule, node: ast.expr | ast.stmt) -> Span:
    """Return where a node is, in characters."""
    start, end = module.span(node)
    (row, column), (end_row, end_column) = module.lines.place(start), module.lines.place(end)
    return row, column - 1, end_row, end_column - 1


def _training_loops(module: PythonModule) -> list[tuple[ast.For, str]]:
    """Return the innermost loops that hold a backward pass, with the name of the loader each goes over."""
    found = []
    for node in module.of_type(ast.For):
        calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and module.dotted(c.func).endswith(".backward")]
        own = [c for c in calls if next(p for p in module.ancestors(c) if isinstance(p, ast.For)) is node]
        iterated: ast.expr = node.iter
        while isinstance(iterated, ast.Call) and iterated.args:
            iterated = iterated.args[0]
        if own and isinstance(iterated, ast.Name | ast.Attribute):
            found.append((node, module.dotted(iterated)))
    return found


def _change_loaders(module: PythonModule, loops: list[tuple[ast.For, str]], plan: Plan) -> dict[str, str]:
    """Give the training loaders shares of the batches; returns the text of the weight for each loader's name."""
    sharded = set()
    for loop, name in loops:
        sharded |= {name, *_handed_as(module, module.function_of(loop), name)}
    weights: dict[str, str] = {}
    changed = False
    for call, name in module.calls:
        if last_name(name) != "DataLoader":
            continue
        statement = module.statement_of(call)
        targets = {module.dotted(t) for t in statement.targets} if isinstance(statement, ast.Assign) else set()
        if not targets & sharded:
            plan.comments.setdefault(statement.lineno, []).append(
                "every rank goes over the whole of it: right, and no faster than before"
            )
        elif any(argument(call, k) is not None for k in ("sampler", "batch_sampler")) or len(call.args) > 3:
            plan.unsure(statement.lineno, "not sure: share the batches of this sampler among the ranks")
        else:
            plan.expressions[span_of(module, call.func)] = "RankLoader"
            plan.need(helpers.LOADER)
            changed = True
    if changed:
        weights = {name: f"{name}.loss_weight" for _, name in loops}
    else:
        row = loops[0][0].lineno
        plan.unsure(row, "not sure: no DataLoader of this loop was found; give each rank its share of every batch")
    return weights


def _handed_as(module: PythonModule, function: FunctionNode | None, parameter: str) -> set[str]:
    """Return the names that callers of a function give for one of its parameters."""
    if function is None:
        return set()
    parameters = [a.arg for a in [*function.args.posonlyargs, *function.args.args]]
    if parameter not in parameters:
        return set()
    found = set()
    for call, name in module.calls:
        if last_name(name) == function.name:
            offset = 1 if parameters[:1] == ["self"] else 0
            value = argument(call, parameter, parameters.index(parameter) - offset)
            if value is not None:
                dotted = module.dotted(value)
                found |= {dotted, *_handed_as(module, module.function_of(call), dotted)}
    return found


def _change_loss(module: PythonModule, loop: ast.For, weight: str, plan: Plan) -> None:
    """Weigh the loss by the share's size, and take its mean over the ranks where it is read."""
    if not weight:
        return
    losses = set()
    for call in [c for c, name in module.calls if name.endswith("backward") and loop in set(module.ancestors(c))]:
        receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
        scaled = isinstance(receiver, ast.Call) and last_name(module.dotted(receiver.func)) == "scale"
        if isinstance(receiver, ast.Call) and scaled and len(receiver.args) == 1:
            receiver = receiver.args[0]
        if not isinstance(receiver, ast.Name):
            plan.unsure(module.statement_of(call).lineno, f"not sure: multiply what is differentiated here by {weight}")
            continue
        losses.add(receiver.id)
        inner = f"{receiver.id} * {weight}"
        plan.expressions[span_of(module, receiver)] = inner if scaled else f"({inner})"
    if re.search(r"reduction\s*=\s*['\"](?:sum|none)['\"]", module.text):
        plan.unsure(loop.lineno, "not sure: the loss must be a mean over the batch; here it seems to be a sum")
    for node in ast.walk(loop):
        if isinstance(node, ast.Call) and _reads(module, node) in losses:
            plan.expressions[span_of(module, node)] = f"global_mean({_reads(module, node)}, {weight})"
            plan.need(helpers.MEAN)
            statement = module.statement_of(node)
            if re.search(r"\.size\(0\)|\.shape\[0\]|len\(", ast.unparse(statement)) and isinstance(
                statement, ast.AugAssign
            ):
                plan.unsure(
                    statement.lineno,
                    "not sure: the factor is this rank's number of samples, the mean is over all ranks",
                )
        elif isinstance(node, ast.AugAssign) and _counts(module, node, losses):
            plan.unsure(node.lineno, "not sure: this counts this rank's share only; add the ranks' numbers up")


def _counts(module: PythonModule, node: ast.AugAssign, losses: set[str]) -> bool:
    """Whether something of this rank's samples is added up, other than the loss."""
    if any(isinstance(n, ast.Call) and _reads(module, n) in losses for n in ast.walk(node)):
        return False
    return re.search(r"\.item\(\)|\.size\(0\)|\.shape\[0\]|len\(", ast.unparse(node.value)) is not None


def _reads(module: PythonModule, call: ast.Call) -> str:
    """Return the name whose value a call reads as a number (``loss.item()``, ``float(loss)``), or ""."""
    if isinstance(call.func, ast.Name) and call.func.id == "float" and len(call.args) == 1:
        return module.dotted(call.args[0])
    match = re.fullmatch(r"(\w+)(?:\.detach\(\)|\.data|\.cpu\(\))*\.item\(\)", module.source(call))
    return match[1] if match else ""


def _wrap_models(module: PythonModule, plan: Plan) -> None:
    """Wrap each model before its optimizer is made, and go through ``bare`` where the model itself is meant."""
    wrapped: dict[str, ast.stmt] = {}
    for call, name in module.calls:
        if not re.match(r"torch\.optim\.\w+$|\w*optim\w*\.\w+$", name) or not call.args:
            continue
        statement = module.statement_of(call)
        models = {
            module.dotted(n.func).removesuffix(".parameters")
            for n in ast.walk(call)
            if isinstance(n, ast.Call) and module.dotted(n.func).endswith(".parameters")
        }
        if not models:
            plan.unsure(statement.lineno, "not sure: wrap the model in DistributedDataParallel before this line")
        for model in sorted(models - set(wrapped)):
            wrapped[model] = statement
            plan.before.setdefault(statement.lineno, []).append(f"{model} = DistributedDataParallel({model})")
    if len(wrapped) > 1:
        row = min(s.lineno for s in wrapped.values())
        plan.unsure(
            row, "not sure: several models; each backward pass must go through all those whose gradients it makes"
        )
    if not wrapped:
        plan.notes.append((1, "not sure: no optimizer was found; wrap the model in DistributedDataParallel"))
    row = min((s.lineno for s in wrapped.values()), default=1)
    if re.search(r"BatchNorm[123]d|resnet|mobilenet|densenet|efficientnet", module.text):
        plan.unsure(
            row, "not sure: BatchNorm takes each rank's share for the batch, so the curve is not that of one process"
        )
    if re.search(r"Dropout", module.text):
        plan.unsure(row, "not sure: dropout draws other masks on each rank, so the curve agrees on average only")
    for node in module.of_type(ast.Attribute):
        name = module.dotted(node.value)
        meant = node.attr in ("state_dict", "load_state_dict") or node.attr not in OF_WRAPPER
        if name in wrapped and meant and isinstance(node.ctx, ast.Load):
            plan.expressions[span_of(module, node.value)] = f"bare({name})"
            plan.need(helpers.BARE)
        elif name in wrapped and node.attr in ("to", "cuda") and node.lineno > wrapped[name].lineno:
            plan.unsure(node.lineno, "not sure: move the model to its device before it is wrapped")


def _change_writes(module: PythonModule, plan: Plan) -> None:
    """Write on rank 0, print on rank 0, download on rank 0 first."""
    writers = set()
    for call, name in module.calls:
        statement = module.statement_of(call)
        if _WRITER.search(name):
            plan.expressions[span_of(module, call)] = f"{module.source(call)} if RANK == 0 else None"
            writers |= {module.dotted(t) for t in getattr(statement, "targets", [])}
    for call, name in module.calls:
        statement = module.statement_of(call)
        whole = isinstance(statement, ast.Expr) and statement.value is call
        if name == "print":
            plan.expressions[span_of(module, call.func)] = "print0"
            plan.need(helpers.PRINT)
        elif whole and (_WRITES.match(name) or name.rsplit(".", 1)[0] in writers):
            if not any(isinstance(p, ast.With) and p.lineno in plan.wrapped for p in module.ancestors(call)):
                plan.wrapped[statement.lineno] = "if RANK == 0:"
        elif name == "open" and re.match(r"[wax]", str(constant(argument(call, "mode", 1)))):
            holder = module.parents[call]
            if isinstance(holder, ast.withitem):
                plan.wrapped[statement.lineno] = "if RANK == 0:"
            else:
                plan.unsure(statement.lineno, "not sure: every rank opens this file to write")
        elif name == "os.makedirs" and argument(call, "exist_ok") is None:
            plan.expressions[span_of(module, call)] = f"{module.source(call)[:-1].rstrip(', ')}, exist_ok=True)"
        elif constant(argument(call, "download")) is True and isinstance(statement, ast.Assign | ast.Expr):
            plan.wrapped[statement.lineno] = "with rank0_first():"
            plan.need(helpers.FIRST)
        elif re.match(r"tqdm(?:\.\w+)*$", name) and argument(call, "disable") is None and call.args:
            last = call.args[-1] if not call.keywords else call.keywords[-1].value
            text = module.source(last)
            if span_of(module, last) not in plan.expressions:
                plan.expressions[span_of(module, last)] = f"{text}, disable=RANK != 0"


def _change_devices(module: PythonModule, plan: Plan) -> None:
    """Take this rank's device where the first one was named."""
    for node in module.of_type(ast.Constant):
        if node.value == "cuda:0":
            plan.expressions[span_of(module, node)] = 'f"cuda:{LOCAL_RANK}"'
    for call, name in module.calls:
        if name.endswith((".cuda", ".to")) and len(call.args) == 1 and constant(call.args[0]) == 0:
            plan.expressions[span_of(module, call.args[0])] = "LOCAL_RANK"
        elif name == "torch.cuda.set_device" or last_name(name) == "DataParallel":
            plan.unsure(
                module.statement_of(call).lineno, "not sure: join() has chosen this rank's device; remove this line"
            )


def _find_unseeded(module: PythonModule, loops: list[ast.For], plan: Plan) -> None:
    """Tell of data that each rank would draw for itself: sample 7, or the training set, is then not one thing."""
    if _SEEDS.search(module.text):
        return
    for call, name in module.calls:
        function = module.function_of(call)
        per_step = (function and function.name in _PER_STEP) or any(loop in module.ancestors(call) for loop in loops)
        if _DRAWS.search(name) and not per_step:
            row = module.statement_of(call).lineno
            plan.unsure(row, "not sure: nothing seeds this, so each rank draws its own; seed all ranks alike before")


def _find_entry(module: PythonModule, plan: Plan) -> None:
    for statement in module.tree.body:
        if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            plan.entry = statement.lineno
