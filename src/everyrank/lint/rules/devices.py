"""Rules about which device a rank takes: ER001, ER002, ER005, ER303."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Edit, Finding, Fix
from everyrank.lint.guards import rank_from_environment
from everyrank.lint.module import argument, constant, identifiers, last_name
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

_DEVICE_COUNT = ("torch.cuda.device_count", "torch.accelerator.device_count")
_DEVICE_CALLS = ("torch.cuda.set_device", "torch.device", "torch.accelerator.set_device_index", "torch.cuda.device")


def device_from_global_rank(program: Program) -> Iterator[Finding]:
    """The device is taken from the global rank.

    Finds: `rank % torch.cuda.device_count()`, and a device made of the global rank (`dist.get_rank()`,
    `os.environ["RANK"]`). A rank that `mp.spawn` handed to its function is a local one and is not reported.

    Why it hurts: The launcher says in `LOCAL_RANK` which device is a process's own. Where nodes have different numbers
    of GPUs, where ranks are not placed node by node, or where the scheduler shows each process one GPU, the remainder
    names another one: two ranks share a GPU, or "invalid device ordinal".

    The change: Take `LOCAL_RANK`. The fix keeps the old number for a start without a launcher.

    Before:

        import os
        import torch
        import torch.distributed as dist

        dist.init_process_group("nccl", init_method="env://")
        rank = dist.get_rank()
        torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.destroy_process_group()

    After:

        import os
        import torch
        import torch.distributed as dist

        dist.init_process_group("nccl", init_method="env://")
        rank = dist.get_rank()
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        dist.destroy_process_group()
    """
    module = program.module
    for node in module.of_type(ast.BinOp):
        if not isinstance(node.op, ast.Mod) or _in_environment_read(program, node):
            continue
        of_rank = any(re.search("rank|proc", n, re.IGNORECASE) for n in identifiers(node.left))
        if of_rank and _is_device_count(program, node.right) and "LOCAL" not in ast.unparse(node.left).upper():
            yield _local_rank_finding(program, node, f"{module.source(node)} guesses this rank's device")
    for call, name in module.calls:
        for value in _device_values(call, name):
            if program.is_global_rank(value):
                what = f"{module.source(value)} is the global rank, and names the device"
                yield _local_rank_finding(program, value, what)


def _device_values(call: ast.Call, name: str) -> Iterator[ast.expr]:
    """Yield what a call takes for the number of a device."""
    if last_name(name) in ("cuda", "to") and "." in name:
        yield from call.args[:1]
    for value in call.args[:2] if name in _DEVICE_CALLS else ():
        if isinstance(value, ast.JoinedStr) and name == "torch.device":
            yield from (part.value for part in value.values if isinstance(part, ast.FormattedValue))
        else:
            yield value


def _in_environment_read(program: Program, node: ast.AST) -> bool:
    """Whether a node is the fallback of a read of LOCAL_RANK."""
    for parent in program.module.ancestors(node):
        if rank_from_environment(program.module, parent) in ("LOCAL_RANK", "SLURM_LOCALID"):
            return True
        if isinstance(parent, ast.IfExp | ast.If) and "LOCAL_RANK" in set(identifiers(parent.test)):
            return True
        if isinstance(parent, ast.FunctionDef):
            return False
    return False


def _is_device_count(program: Program, node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return program.module.dotted(node.func) in _DEVICE_COUNT
    if isinstance(node, ast.Name | ast.Attribute):
        values = program.values_of(node)
        return bool(values) and all(
            isinstance(v, ast.Call) and program.module.dotted(v.func) in _DEVICE_COUNT for v in values
        )
    return False


def _local_rank_finding(program: Program, node: ast.expr, what: str, code: str = "ER001") -> Finding:
    name, imports = program.module.name_for("os")
    variable = "SLURM_LOCALID" if _is_of_slurm(program, node) else "LOCAL_RANK"
    text = f'int({name}.environ.get("{variable}", {program.module.source(node)}))'
    return program.module.finding(
        code,
        node,
        f"{what}: wrong wherever ranks and GPUs are not counted alike on every node. Fix: take {variable}.",
        Fix(f"Take {variable}, and the old number without a launcher", (program.module.replace(node, text), *imports)),
    )


def _is_of_slurm(program: Program, node: ast.expr) -> bool:
    """Whether the rank in an expression was last read from Slurm's SLURM_PROCID; srun sets no LOCAL_RANK."""
    module = program.module
    names = {module.dotted(n) for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)}
    reads = [
        (assign.lineno, variable)
        for assign in module.of_type(ast.Assign)
        if assign.lineno < node.lineno
        if module.function_of(assign) is module.function_of(node)
        if names & {module.dotted(target) for target in assign.targets}
        if (variable := rank_from_environment(module, assign.value))
    ]
    return bool(reads) and max(reads)[1] == "SLURM_PROCID"


def visible_devices_in_code(program: Program) -> Iterator[Finding]:
    """CUDA_VISIBLE_DEVICES is set by the distributed program.

    Finds: `os.environ["CUDA_VISIBLE_DEVICES"] = ...` in a file that joins a process group or wraps a model.

    Why it hurts: The launcher or the scheduler has already said which GPUs are ours; this takes others, or the same one
    on every rank. After CUDA is started it has no effect at all. And `LOCAL_RANK` then counts other devices than the
    launcher meant.

    The change: Leave it to whoever starts the program, and take the device by `LOCAL_RANK`. The fix removes the line.

    Before:

        import os
        import torch.distributed as dist

        os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,2,3"
        dist.init_process_group(init_method="env://")
        dist.destroy_process_group()

    After:

        import os
        import torch.distributed as dist

        dist.init_process_group(init_method="env://")
        dist.destroy_process_group()
    """
    if not program.is_distributed:
        return
    module = program.module
    joining = {module.function_of(call) for call in [*program.joins, *program.wraps]}
    for node in module.of_type(ast.Assign):
        function = module.function_of(node)
        if function is not None and function not in joining and function not in program.guards.open_functions:
            continue  # a helper that somebody else calls, perhaps for one process
        target = node.targets[0]
        if not isinstance(target, ast.Subscript) or rank_from_environment(module, target) != "CUDA_VISIBLE_DEVICES":
            continue
        if _only_if_unset(program, node) or constant(node.value) in ("", "-1"):
            continue
        fix = None
        if module.begins_line(node) and len(module.block_of(node)) > 1:
            end = module.span(node)[1]
            begin = module.lines.starts[node.lineno - 1]
            rest = module.text[end:].split("\n", 1)[0]
            if not rest.strip():
                end += len(rest) + 1
                fix = Fix("Remove the line", (Edit(begin, min(end, len(module.text)), ""),), safe=False)
        yield module.finding(
            "ER002",
            node,
            "CUDA_VISIBLE_DEVICES is set in a distributed program, over what the launcher or scheduler gave it. "
            "Fix: leave it to them and take the device by LOCAL_RANK.",
            fix,
        )


def _only_if_unset(program: Program, node: ast.AST) -> bool:
    return any(
        isinstance(parent, ast.If) and "CUDA_VISIBLE_DEVICES" in set(identifiers(parent.test))
        for parent in program.module.ancestors(node)
    )


def world_size_from_device_count(program: Program) -> Iterator[Finding]:
    """The world size is taken from the number of GPUs that this process sees.

    Finds: `world_size = torch.cuda.device_count()`, or `init_process_group(world_size=torch.cuda.device_count())`, in a
    program that is started by a launcher (one that starts its own ranks with `mp.spawn` may count its GPUs).

    Why it hurts: With two nodes, with fewer ranks than GPUs, or with one visible GPU for each process, the number is
    wrong: the group waits for ranks that never come, or the ranks train apart.

    The change: Read `WORLD_SIZE`, or ask `dist.get_world_size()` after joining.

    Before:

        import os
        import torch
        import torch.distributed as dist

        rank = int(os.environ.get("RANK", "0"))
        world_size = torch.cuda.device_count()
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        dist.destroy_process_group()

    After:

        import os
        import torch
        import torch.distributed as dist

        rank = int(os.environ.get("RANK", "0"))
        world_size = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count()))
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        dist.destroy_process_group()
    """
    module = program.module
    if program.starts_ranks or not program.variables_read or not program.is_distributed:
        return
    for call, name in module.calls:
        if name not in _DEVICE_COUNT:
            continue
        parent = module.parents[call]
        target = parent.arg if isinstance(parent, ast.keyword) else None
        if isinstance(parent, ast.Assign):
            target = module.dotted(parent.targets[0])
        if last_name(target or "").lower() not in ("world_size", "worldsize") or program.guards.is_guarded(call):
            continue
        os_name, imports = module.name_for("os")
        text = f'int({os_name}.environ.get("WORLD_SIZE", {module.source(call)}))'
        yield module.finding(
            "ER005",
            call,
            "The world size is the number of GPUs that this process sees: wrong on several nodes, or with other than "
            "one rank for each GPU. Fix: read WORLD_SIZE.",
            Fix("Read WORLD_SIZE, and count GPUs without a launcher", (module.replace(call, text), *imports)),
        )


def device_ids_from_global_rank(program: Program) -> Iterator[Finding]:
    """DistributedDataParallel is given the global rank as its device.

    Finds: `DistributedDataParallel(model, device_ids=[rank])` (or `output_device=rank`) where `rank` is the global
    rank.

    Why it hurts: It works on one node. On the second one the first rank has number 8, and there is no GPU 8: "invalid
    device ordinal".

    The change: Give the local rank.

    Before:

        import os
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        rank = dist.get_rank()
        model = DistributedDataParallel(net, device_ids=[rank])

    After:

        import os
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        rank = dist.get_rank()
        model = DistributedDataParallel(net, device_ids=[int(os.environ.get("LOCAL_RANK", rank))])
    """
    for call in program.wraps:
        ids = argument(call, "device_ids", 1)
        values = list(ids.elts) if isinstance(ids, ast.List | ast.Tuple) else []
        for value in [*values, argument(call, "output_device", 2)]:
            if value is not None and program.is_global_rank(value):
                what = f"{program.module.source(value)} is the global rank, and is taken for a device"
                yield _local_rank_finding(program, value, what, "ER303")


RULES = (
    Rule("ER001", "device-from-global-rank", {"python": device_from_global_rank}, fixes="safe"),
    Rule("ER002", "visible-devices-in-code", {"python": visible_devices_in_code}, fixes="unsafe"),
    Rule("ER005", "world-size-from-device-count", {"python": world_size_from_device_count}, fixes="safe"),
    Rule("ER303", "device-ids-from-global-rank", {"python": device_ids_from_global_rank}, fixes="safe"),
)
