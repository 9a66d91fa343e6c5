"""Rules about samplers and loaders: ER201 to ER205."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Finding, Fix
from everyrank.lint.module import PythonModule, argument, constant, has_unknown_arguments, keyword, last_name
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

_SHARDS = re.compile(
    r"Sampler|shard|split_dataset_by_node|\.prepare\b|prepare_data_loader|WebLoader|wds\."
    r"|[/%*:] *world_size|world_size *[/%*:]|num_replicas|IterableDataset|rank::"
)
_SAMPLERS = ("sampler", "batch_sampler")
_SAMPLER = re.compile(r"(?:^|\.)DistributedSampler$")


def epoch_not_set(program: Program) -> Iterator[Finding]:
    """The epoch is never told to the DistributedSampler.

    Finds: A `DistributedSampler` that shuffles, given to a loader in the same function that has the loop over
    epochs, in a file without `set_epoch`.

    Why it hurts: The sampler seeds its order with the epoch it was told. Untold, every epoch has the same order,
    and the batches hold the same samples together each time: training is worse, and nothing says so.

    The change: `sampler.set_epoch(epoch)` at the beginning of each epoch.

    Before:

        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        def train(dataset, step, num_epochs):
            sampler = DistributedSampler(dataset)
            loader = DataLoader(dataset, batch_size=8, sampler=sampler)
            for epoch in range(num_epochs):
                for batch in loader:
                    step(batch)

    After:

        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        def train(dataset, step, num_epochs):
            sampler = DistributedSampler(dataset)
            loader = DataLoader(dataset, batch_size=8, sampler=sampler)
            for epoch in range(num_epochs):
                sampler.set_epoch(epoch)
                for batch in loader:
                    step(batch)
    """
    module = program.module
    if "set_epoch" in module.text:
        return
    for call, name in module.calls:
        if not _SAMPLER.search(name) or constant(argument(call, "shuffle", 3)) is False or has_unknown_arguments(call):
            continue
        assign = module.statement_of(call)
        if not isinstance(assign, ast.Assign) or not isinstance(assign.targets[0], ast.Name):
            continue
        sampler = assign.targets[0].id
        loop = _epoch_loop(module, module.function_of(call), sampler)
        if loop is not None:
            line = f"{sampler}.set_epoch({ast.unparse(loop.target)})"
            yield module.finding(
                "ER201",
                call,
                f"The loop in line {loop.lineno} never tells {sampler} its epoch: every epoch has the same order. "
                f"Fix: {line} at its beginning.",
                _told_each_epoch(module, assign, call, loop, line),
            )


def _epoch_loop(module: PythonModule, function: ast.AST | None, sampler: str) -> ast.For | None:
    """Return the loop over epochs of a function that goes over a loader with this sampler."""
    loaders = set()
    for call, name in module.calls:
        given, statement = argument(call, "sampler", 3), module.statement_of(call)
        is_given = last_name(name) == "DataLoader" and isinstance(given, ast.Name) and given.id == sampler
        if is_given and isinstance(statement, ast.Assign) and module.function_of(call) is function:
            loaders |= {module.dotted(t) for t in statement.targets}
    for node in module.of_type(ast.For):
        if module.function_of(node) is not function or not isinstance(node.target, ast.Name):
            continue
        if not re.search(r"epoch", f"{node.target.id} {ast.unparse(node.iter)}", re.IGNORECASE):
            continue
        if any(isinstance(n, ast.Name) and n.id in loaders for n in ast.walk(node)):
            return node
    return None


def _told_each_epoch(module: PythonModule, assign: ast.Assign, call: ast.Call, loop: ast.For, line: str) -> Fix | None:
    surely = assign.value is call and module.parents[assign] is module.parents[loop] and assign.lineno < loop.lineno
    if not surely:
        line = f"if isinstance({ast.unparse(assign.targets[0])}, {module.source(call.func)}):\n    {line}"
    first = loop.body[0]
    return (
        Fix("Tell the sampler each epoch", (module.insert_before(first, line),)) if module.begins_line(first) else None
    )


def shuffle_beside_sampler(program: Program) -> Iterator[Finding]:
    """A loader is given both a sampler and shuffle=True.

    Finds: `DataLoader(..., shuffle=True, sampler=sampler)`.

    Why it hurts: "sampler option is mutually exclusive with shuffle": the loader is refused as soon as there is a
    sampler, which is when the run is distributed.

    The change: Shuffle only where there is no sampler; the sampler shuffles otherwise.

    Before:

        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        def make(dataset):
            sampler = DistributedSampler(dataset)
            return DataLoader(dataset, batch_size=8, shuffle=True, sampler=sampler)

    After:

        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        def make(dataset):
            sampler = DistributedSampler(dataset)
            return DataLoader(dataset, batch_size=8, shuffle=(sampler is None), sampler=sampler)
    """
    module = program.module
    for call, name in module.calls:
        if last_name(name) != "DataLoader":
            continue
        shuffle, sampler = argument(call, "shuffle", 2), argument(call, "sampler", 3)
        if shuffle is None or constant(shuffle) is not True:
            continue
        if sampler is None or (isinstance(sampler, ast.Constant) and sampler.value is None):
            continue
        if isinstance(sampler, ast.Name) and not any("Sampler" in ast.unparse(v) for v in program.values_of(sampler)):
            continue
        text = f"({module.source(sampler)} is None)" if isinstance(sampler, ast.Name | ast.Attribute) else "False"
        yield module.finding(
            "ER202",
            call,
            "shuffle=True and a sampler exclude each other: the loader is refused. Fix: shuffle without one only.",
            Fix("Shuffle only without a sampler", (module.replace(shuffle, text),)),
        )


def sampler_missing(program: Program) -> Iterator[Finding]:
    """A distributed program trains on a loader without a sampler.

    Finds: A `DataLoader` with `shuffle=True` in a file that wraps a model in DistributedDataParallel, and in which
    nothing shares the data among the ranks.

    Why it hurts: Every rank trains on the whole data set: an epoch costs as much on eight GPUs as on one, and the
    ranks' batches overlap.

    The change: A `DistributedSampler`, and `set_epoch` in each epoch.

    Before:

        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader

        def train(net, dataset):
            model = DistributedDataParallel(net)
            for batch in DataLoader(dataset, batch_size=8, shuffle=True):
                model(batch).sum().backward()

    After:

        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader, DistributedSampler

        def train(net, dataset):
            model = DistributedDataParallel(net)
            for batch in DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset)):
                model(batch).sum().backward()
    """
    module = program.module
    if not program.wraps or "backward" not in module.text or _shares_data(program):
        return
    for call, name in module.calls:
        if last_name(name) != "DataLoader" or has_unknown_arguments(call) or program.guards.is_guarded(call):
            continue
        if constant(argument(call, "shuffle", 2)) is not True or any(keyword(call, k) for k in _SAMPLERS):
            continue
        dataset, shuffle = argument(call, "dataset", 0), keyword(call, "shuffle")
        fix = None
        if dataset is not None and shuffle is not None:
            text = f"sampler=torch.utils.data.DistributedSampler({module.source(dataset)})"
            _, imports = module.name_for("torch")
            fix = Fix("Share the data among the ranks", (module.replace(shuffle, text), *imports), safe=False)
        yield module.finding(
            "ER203",
            call,
            "Every rank trains on the whole data set: nothing shares it among the ranks. "
            "Fix: sampler=DistributedSampler(dataset), and set_epoch in each epoch.",
            fix,
        )


def _shares_data(program: Program) -> bool:
    """Whether anything shares the data: a sampler, a shard, arithmetic with the world size outside logs."""
    module = program.module
    text = re.sub(r"init_process_group\([^)]*\)|(?m:^\s*(?:#|import |from ).*$)", "", module.text)
    text = re.sub(r"\bdef \w+\([^)]*\)|world_size *= *[^\n]*|nprocs *= *\w+|args=\([^)]*\)", "", text)
    return bool(_SHARDS.search(text))


def evaluation_padded(program: Program) -> Iterator[Finding]:
    """An evaluation loader's DistributedSampler pads with duplicates (hint).

    Finds: `DistributedSampler(dataset, shuffle=False)` without `drop_last`.

    Why it hurts: The sampler repeats samples until all ranks have the same number: those count twice in the metric,
    which then depends on the world size.

    The change: Evaluate on one rank, or take an order without padding (`everyrank.GlobalSampler`).

    Before:

        from torch.utils.data.distributed import DistributedSampler

        def make(val_dataset):
            return DistributedSampler(val_dataset, shuffle=False)

    After:

        import everyrank
        import torch.distributed as dist

        def make(val_dataset):
            return everyrank.GlobalSampler(val_dataset, shuffle=False)
    """
    for call, name in program.module.calls:
        pads = constant(argument(call, "drop_last", 5)) is not True
        if _SAMPLER.search(name) and constant(argument(call, "shuffle", 3)) is False and pads:
            yield program.module.finding(
                "ER204",
                call,
                "Samples are repeated until the ranks have equal numbers, and count twice in a metric. "
                "Fix: everyrank.GlobalSampler, which does not pad.",
            )


def batch_size_not_divided(program: Program) -> Iterator[Finding]:
    """The batch size is not divided by the world size (hint).

    Finds: A loader with a DistributedSampler in a file that never brings the batch size and the world size together.

    Why it hurts: With eight ranks the optimizer sees batches eight times as large and takes an eighth of the steps,
    with the learning rate of the small ones. Some want just that, and scale the learning rate.

    The change: Divide the batch size by the world size, or scale the learning rate, and say which.

    Before:

        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        def make(dataset, args):
            return DataLoader(dataset, batch_size=args.batch_size, sampler=DistributedSampler(dataset))

    After:

        import torch.distributed as dist
        from torch.utils.data import DataLoader
        from torch.utils.data.distributed import DistributedSampler

        def make(dataset, args):
            share = args.batch_size // dist.get_world_size()
            return DataLoader(dataset, batch_size=share, sampler=DistributedSampler(dataset))
    """
    module = program.module
    if re.search(
        r"batch\w*\W+(?:[\w.]+\s*)?[/*]\s*[\w.(]*(?:world|num_gpu|ngpu|n_gpu|nproc|num_replicas)", module.text
    ):
        return
    if re.search(r"(?:world\w*|n\w*gpus?\w*)(?:\(\))?\s*\*", module.text) or "get_world_size() *" in module.text:
        return
    if not any(_SAMPLER.search(name) for _, name in module.calls):
        return
    for call, name in module.calls:
        size = argument(call, "batch_size", 1)
        if last_name(name) != "DataLoader" or size is None or argument(call, "sampler", 3) is None:
            continue
        if not re.search(r"//|(?i:per)|world_size", module.source(size)):
            yield module.finding(
                "ER205",
                size,
                "The batch size is each rank's: the global batch grows with the ranks. "
                "Fix: divide it by the world size, or scale the learning rate.",
            )


RULES = (
    Rule("ER201", "epoch-not-set", {"python": epoch_not_set}, fixes="safe"),
    Rule("ER202", "shuffle-beside-sampler", {"python": shuffle_beside_sampler}, fixes="safe"),
    Rule("ER203", "sampler-missing", {"python": sampler_missing}, fixes="unsafe"),
    Rule("ER204", "evaluation-padded", {"python": evaluation_padded}, default=False),
    Rule("ER205", "batch-size-not-divided", {"python": batch_size_not_divided}, default=False),
)
