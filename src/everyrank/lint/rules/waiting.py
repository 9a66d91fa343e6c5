"""Rules about loading and waiting: ER421, ER422, ER431."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Edit, Finding, Fix
from everyrank.lint.module import argument, constant, has_unknown_arguments, values_given
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule
from everyrank.lint.rules.writing import is_own_file


def load_without_map_location(program: Program) -> Iterator[Finding]:
    """A checkpoint is loaded without map_location.

    Finds: `torch.load(path)` without `map_location` that is reached on every rank, in a program that joins a group or
    wraps a model. A file of each rank's own is not reported.

    Why it hurts: The tensors come back on the GPU they were saved from, GPU 0 as a rule: every rank of a node puts its
    copy there, and the node with the largest model is out of memory at the start. Without a GPU the file cannot be read
    at all.

    The change: `map_location="cpu"`; `load_state_dict` copies from there.

    Before:

        import torch
        from torch.nn.parallel import DistributedDataParallel

        net = torch.nn.Linear(2, 2)
        net.load_state_dict(torch.load("net.pt"))
        model = DistributedDataParallel(net)

    After:

        import torch
        from torch.nn.parallel import DistributedDataParallel

        net = torch.nn.Linear(2, 2)
        net.load_state_dict(torch.load("net.pt", map_location="cpu"))
        model = DistributedDataParallel(net)
    """
    module = program.module
    if not program.is_distributed:
        return
    careful = {module.function_of(c) for c, n in module.calls if n == "torch.load" and argument(c, "map_location", 1)}
    for call, name in module.calls:
        if module.function_of(call) in careful:
            continue  # one of several ways, and the author thought of it
        if name != "torch.load" or argument(call, "map_location", 1) is not None or has_unknown_arguments(call):
            continue
        if re.search(r"cpu|buffer|bytesio|scaler", module.source(module.statement_of(call)), re.IGNORECASE):
            continue
        if not call.args or is_own_file(program, call.args[0]) or not program.guards.runs_on_every_rank(call):
            continue
        if "torch.save" in module.text and re.search(r"\.cpu\(\)", module.text):
            continue  # it may have saved from the CPU
        end = max(module.span(value)[1] for value in values_given(call))
        fix = None
        if not module.text[end : module.span(call)[1] - 1].strip(" \t\r\n,"):
            edit = Edit(end, end, ', map_location="cpu"')
            fix = Fix("Load to the CPU", (edit,), safe=_goes_to_module(program, call))
        yield module.finding(
            "ER421",
            call,
            'Every rank loads onto the GPU that the file was saved from. Fix: map_location="cpu".',
            fix,
        )


def _goes_to_module(program: Program, call: ast.Call) -> bool:
    """Whether what is loaded only goes to load_state_dict, which moves it to where the module is."""
    module = program.module
    for parent in module.ancestors(call):
        if isinstance(parent, ast.Call):
            return module.dotted(parent.func).endswith("load_state_dict")
        if isinstance(parent, ast.stmt):
            break
    return False


def load_of_pickles(program: Program) -> Iterator[Finding]:
    """A checkpoint is loaded without saying weights_only (hint).

    Finds: `torch.load` without `weights_only`.

    Why it hurts: Before torch 2.6 it runs whatever the pickle holds; since then it refuses a file that holds more than
    tensors. Either way the reader does not see which was meant.

    The change: `weights_only=True`; save what is no tensor beside it, as JSON.

    Before:

        import torch
        import torch.distributed as dist

        def resume(path):
            return torch.load(path, map_location="cpu")

    After:

        import torch
        import torch.distributed as dist

        def resume(path):
            return torch.load(path, map_location="cpu", weights_only=True)
    """
    for call, name in program.module.calls:
        says = constant(argument(call, "weights_only")) is True or has_unknown_arguments(call)
        if name == "torch.load" and not says:
            yield program.module.finding(
                "ER422", call, "It does not say whether the file may hold code. Fix: weights_only=True."
            )


def waits_by_sleeping(program: Program) -> Iterator[Finding]:
    """Ranks wait for each other by sleeping.

    Finds: `time.sleep` under a condition on the rank, and a loop that sleeps until a file exists, in a distributed
    program.

    Why it hurts: The time is a guess: too short on the day when the file system is slow, and then a rank reads half a
    file. Files are seen late or never over NFS. If the other rank has died, the loop never ends.

    The change: `dist.barrier()` (or `everyrank.monitored_barrier`, which names the ranks that did not come).

    Before:

        import os
        import time
        import torch.distributed as dist

        def wait(path):
            dist.init_process_group("gloo")
            while not os.path.exists(path):
                time.sleep(1)
            dist.destroy_process_group()

    After:

        import os
        import torch.distributed as dist

        def wait(path):
            dist.init_process_group("gloo")
            dist.barrier()
            dist.destroy_process_group()
    """
    module = program.module
    if not program.is_distributed:
        return
    for call, name in module.calls:
        if name != "time.sleep":
            continue
        if isinstance(constant(argument(call, "secs", 0)), int | float) and program.guards.some_ranks_only(call):
            yield module.finding("ER431", call, "Some ranks sleep until the others may be done. Fix: dist.barrier().")
            continue
        for parent in module.ancestors(call):
            if isinstance(parent, ast.While) and re.search(r"exists\(|isfile\(|is_file\(", ast.unparse(parent.test)):
                if re.search(r"\bnot\b", ast.unparse(parent.test)):
                    yield module.finding(
                        "ER431", parent, "Ranks wait for a file that another writes. Fix: dist.barrier()."
                    )
                break


RULES = (
    Rule("ER421", "load-without-map-location", {"python": load_without_map_location}, fixes="safe"),
    Rule("ER422", "load-of-pickles", {"python": load_of_pickles}, default=False),
    Rule("ER431", "waits-by-sleeping", {"python": waits_by_sleeping}),
)
