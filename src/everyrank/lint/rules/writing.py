"""Rules about what every rank writes: ER401 to ER404."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Finding, Fix
from everyrank.lint.module import argument, constant, last_name, values_given
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

_WRITERS = re.compile(r"(?:^|\.)SummaryWriter$|^wandb\.init$|^tensorboardX\.|^mlflow\.start_run$")
_DATA_SETS = ("torchvision.", "torchaudio.", "torchtext.")
_BARS = re.compile(r"^tqdm\.(?:auto\.|notebook\.|std\.)?(?:tqdm|trange)$|^tqdm$")


def saved_by_every_rank(program: Program) -> Iterator[Finding]:
    """Every rank saves the same file.

    Finds: `torch.save` that is reached, through the functions of the file, without any condition on the rank, in a
    program that joins a group or wraps a model. A file name that holds the rank is each rank's own and is not reported.

    Why it hurts: The ranks write into one file at once: now and then a checkpoint is damaged, and it shows when it is
    needed.

    The change: Save on rank 0, and let the others wait if they read the file.

    Before:

        import torch
        import torch.distributed as dist

        def main(net):
            dist.init_process_group("gloo")
            torch.save(net.state_dict(), "model.pt")
            dist.destroy_process_group()

        main(torch.nn.Linear(2, 2))

    After:

        import torch
        import torch.distributed as dist

        def main(net):
            dist.init_process_group("gloo")
            if dist.get_rank() == 0:
                torch.save(net.state_dict(), "model.pt")
            dist.destroy_process_group()

        main(torch.nn.Linear(2, 2))
    """
    module = program.module
    for call, name in module.calls:
        if name != "torch.save" or not _by_every_rank(program, call):
            continue
        target = argument(call, "f", 1)
        if target is None or is_own_file(program, target):
            continue
        yield module.finding(
            "ER401",
            call,
            "Every rank saves this file, all at once. Fix: save on rank 0 only.",
            _rank_zero_fix(program, call),
        )


def _by_every_rank(program: Program, node: ast.AST) -> bool:
    if not program.is_distributed or not program.guards.runs_on_every_rank(node):
        return False
    # It may run in the one process that starts the ranks, and not in what that starts.
    return not program.starts_ranks or program.module.function_of(node) in program.functions_of_ranks


def is_own_file(program: Program, target: ast.AST, depth: int = 0) -> bool:
    """Whether a file name holds the rank or something else of this process alone, or the target is no file."""
    if re.search(r"rank|shard|getpid|uuid|local_|proc_id|buffer|bytesio|tmp|temp", ast.unparse(target), re.IGNORECASE):
        return True
    if isinstance(target, ast.Name) and depth < 2:
        return any(is_own_file(program, value, depth + 1) for value in program.values_of(target))
    return False


def _rank_zero_fix(program: Program, call: ast.Call) -> Fix | None:
    """Put a statement of one line under ``if rank == 0``."""
    module = program.module
    statement = module.statement_of(call)
    if not isinstance(statement, ast.Expr) or statement.value is not call or not module.begins_line(statement):
        return None
    text = module.source(statement)
    if "\n" in text and any(
        isinstance(n, ast.Constant | ast.JoinedStr) and n.end_lineno != n.lineno for n in ast.walk(statement)
    ):
        return None
    name, imports = module.name_for("torch.distributed")
    indented = text.replace("\n", "\n    ")
    condition = f"if not {name}.is_initialized() or {name}.get_rank() == 0:"
    new = f"{condition}{module.newline}{module.indent(statement)}    {indented}"
    return Fix("Do it on rank 0 only", (module.replace(statement, new), *imports), safe=False)


def downloaded_by_every_rank(program: Program) -> Iterator[Finding]:
    """Every rank downloads the same files.

    Finds: A data set made with `download=True` on every rank.

    Why it hurts: The ranks of a node write the same archive and unpack it over each other: "File not found or
    corrupted", once in a while.

    The change: Download on one rank of each node, while the others wait at a barrier; then make it with
    `download=False`.

    Before:

        import torch.distributed as dist
        from torchvision import datasets

        def main():
            dist.init_process_group("gloo")
            data = datasets.MNIST("data", download=True)
            dist.destroy_process_group()

        main()

    After:

        import torch.distributed as dist
        from torchvision import datasets

        def main():
            dist.init_process_group("gloo")
            if dist.get_rank() == 0:
                datasets.MNIST("data", download=True)
            dist.barrier()
            data = datasets.MNIST("data", download=False)
            dist.destroy_process_group()

        main()
    """
    module = program.module
    for call, name in module.calls:
        downloads = constant(argument(call, "download")) is True and name.startswith(_DATA_SETS)
        if downloads and _by_every_rank(program, call) and not _waits_for_main(program, call):
            yield module.finding(
                "ER402",
                call,
                "Every rank downloads this into the same folder. Fix: on one rank, while the others wait at a barrier.",
            )


def _waits_for_main(program: Program, call: ast.Call) -> bool:
    """Whether a barrier that only some ranks meet stands before: the others come when the first has the data."""
    module = program.module
    function = module.function_of(call)
    return any(
        last_name(name) == "barrier" and module.function_of(c) is function and c.lineno < call.lineno
        for c, name in module.calls
    )


def log_of_every_rank(program: Program) -> Iterator[Finding]:
    """Every rank writes the same log.

    Finds: `SummaryWriter(...)`, `wandb.init(...)`, `logging.FileHandler(...)` and the like on every rank, with the same
    folder or name.

    Why it hurts: Each curve appears once a rank and zigzags between them; each line of the log file comes N times, cut
    into one another; N runs are charged.

    The change: Make the writer on rank 0 only, or give each rank a file of its own.

    Before:

        import torch.distributed as dist
        from torch.utils.tensorboard import SummaryWriter

        def main():
            dist.init_process_group("gloo")
            writer = SummaryWriter("runs/one")
            dist.destroy_process_group()

        main()

    After:

        import torch.distributed as dist
        from torch.utils.tensorboard import SummaryWriter

        def main():
            dist.init_process_group("gloo")
            writer = SummaryWriter("runs/one") if dist.get_rank() == 0 else None
            dist.destroy_process_group()

        main()
    """
    module = program.module
    for call, name in module.calls:
        is_file = name in ("logging.FileHandler", "logging.handlers.RotatingFileHandler")
        if not (_WRITERS.search(name) or is_file) or not _by_every_rank(program, call):
            continue
        if any(is_own_file(program, value) for value in values_given(call)):
            continue
        yield module.finding(
            "ER403",
            call,
            f"Every rank makes this {last_name(name) if name != 'wandb.init' else 'wandb run'}. Fix: on rank 0 only.",
        )


def progress_of_every_rank(program: Program) -> Iterator[Finding]:
    """Every rank draws a progress bar.

    Finds: `tqdm(...)` without `disable=` on every rank.

    Why it hurts: N bars overwrite each other on the terminal, and fill the log of a batch job.

    The change: `disable=rank != 0`.

    Before:

        import torch.distributed as dist
        from tqdm import tqdm

        def main(loader):
            dist.init_process_group("gloo")
            for batch in tqdm(loader):
                print(batch)
            dist.destroy_process_group()

        main([1])

    After:

        import torch.distributed as dist
        from tqdm import tqdm

        def main(loader):
            dist.init_process_group("gloo")
            for batch in tqdm(loader, disable=dist.get_rank() != 0):
                print(batch)
            dist.destroy_process_group()

        main([1])
    """
    module = program.module
    for call, name in module.calls:
        if not _BARS.match(name) or argument(call, "disable") is not None or any(k.arg is None for k in call.keywords):
            continue
        if not _by_every_rank(program, call) or re.search(r"rank|position", ast.unparse(call)):
            continue
        dist, imports = module.name_for("torch.distributed")
        end = module.span(call)[1] - 1
        comma = "" if module.text[:end].rstrip().endswith(("(", ",")) else ", "
        edit = module.replace(
            call, f"{module.source(call)[:-1]}{comma}disable={dist}.is_initialized() and {dist}.get_rank() != 0)"
        )
        fix = Fix("Draw it on rank 0 only", (edit, *imports)) if "\n" not in module.source(call) else None
        yield module.finding("ER404", call, "Every rank draws this progress bar. Fix: disable=rank != 0.", fix)


RULES = (
    Rule("ER401", "saved-by-every-rank", {"python": saved_by_every_rank}, fixes="unsafe"),
    Rule("ER402", "downloaded-by-every-rank", {"python": downloaded_by_every_rank}),
    Rule("ER403", "log-of-every-rank", {"python": log_of_every_rank}),
    Rule("ER404", "progress-of-every-rank", {"python": progress_of_every_rank}, fixes="safe"),
)
