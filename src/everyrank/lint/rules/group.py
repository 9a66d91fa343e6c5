"""Rules about joining and leaving the process group: ER101 to ER104."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Edit, Finding, Fix
from everyrank.lint.module import argument, constant, last_name
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule


def joined_too_late(program: Program) -> Iterator[Finding]:
    """The group is joined after the model or the data is made.

    Finds: In the function that calls `init_process_group`, a model moved to the GPU (`.cuda()`, `.to("cuda")`) before a
    device was chosen, a download, or a DistributedSampler, all before the group is joined.

    Why it hurts: Before `set_device` every rank's `.cuda()` goes to GPU 0, which holds a context and a copy of the
    model for each of them. A sampler has no rank to ask for, and a download runs on every rank with no way to wait.

    The change: Join the group and choose the device first.

    Before:

        import os
        import torch
        import torch.distributed as dist

        def main():
            model = torch.nn.Linear(8, 8).cuda()
            dist.init_process_group(init_method="env://")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.destroy_process_group()

    After:

        import os
        import torch
        import torch.distributed as dist

        def main():
            dist.init_process_group(init_method="env://")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            model = torch.nn.Linear(8, 8).cuda()
            dist.destroy_process_group()
    """
    module = program.module
    for join in program.joins:
        function = module.function_of(join)
        chosen = False
        for call, name in module.calls:
            if module.function_of(call) is not function or call.lineno >= join.lineno:
                continue
            chosen = chosen or name.endswith("set_device")
            what = ""
            to_cuda = name.endswith(".to") and call.args and constant(call.args[0]) == "cuda"
            if not chosen and ((name.endswith(".cuda") and not call.args) or to_cuda):
                what = "A model goes to the GPU"
            elif last_name(name) == "DistributedSampler" and argument(call, "num_replicas", 1) is None:
                what = "A sampler asks for its rank"
            if what and not _other_branch(program, call, join):
                yield module.finding(
                    "ER101",
                    call,
                    f"{what} before the group is joined (line {join.lineno}) and a device is chosen. Fix: join first.",
                )


def _other_branch(program: Program, call: ast.AST, join: ast.AST) -> bool:
    """Whether a call stands in a branch that the join is not in: another way through the function."""
    module = program.module
    shared = set(module.ancestors(join))
    return any(
        isinstance(p, ast.If) and (p not in shared or module.in_body(p, call) != module.in_body(p, join))
        for p in module.ancestors(call)
    )


def nccl_without_gpu_check(program: Program) -> Iterator[Finding]:
    """The backend is nccl in a program that also runs without a GPU.

    Finds: `init_process_group("nccl")` in a file that elsewhere takes the CPU where there is no GPU, or that never
    names a GPU at all.

    Why it hurts: The program is written to run on a CPU, and ends with "ProcessGroupNCCL is only supported with GPUs":
    no tests on a laptop or in CI.

    The change: nccl where there is a GPU, gloo elsewhere.

    Before:

        import torch
        import torch.distributed as dist

        def main():
            dist.init_process_group("nccl")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dist.destroy_process_group()

    After:

        import torch
        import torch.distributed as dist

        def main():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            dist.destroy_process_group()
    """
    for join in program.joins:
        if _needs_check(program, join) and _runs_on_cpu(program):
            yield _nccl_finding(program, join, "ER102", "this file also runs without a GPU, where nccl is refused")


def nccl_only(program: Program) -> Iterator[Finding]:
    """The backend is nccl, and nothing asks for a GPU first (hint).

    Finds: `init_process_group("nccl")` without `torch.cuda.is_available()`, in a program that is written for GPUs only.

    Why it hurts: The program cannot be tried, tested or debugged on a machine without GPUs.

    The change: nccl where there is a GPU, gloo elsewhere. A program with CUDA kernels of its own needs more than that.

    Before:

        import torch
        import torch.distributed as dist

        def main():
            dist.init_process_group("nccl")
            torch.cuda.set_device(0)
            dist.destroy_process_group()

    After:

        import torch
        import torch.distributed as dist

        def main():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            torch.cuda.set_device(0)
            dist.destroy_process_group()
    """
    for join in program.joins:
        if _needs_check(program, join) and not _runs_on_cpu(program):
            yield _nccl_finding(program, join, "ER103", "there is no look at whether there is a GPU")


def _needs_check(program: Program, join: ast.Call) -> bool:
    if not program.has_backend(join, "nccl"):
        return False
    for parent in program.module.ancestors(join):
        if isinstance(parent, ast.Try):
            return False
        if isinstance(parent, ast.If | ast.IfExp) and re.search(
            r"is_available|cuda|gpu|nccl|device", ast.unparse(parent.test), re.I
        ):
            return False
    return True


def _runs_on_cpu(program: Program) -> bool:
    module = program.module
    for node in module.of_type(ast.IfExp):
        if any(_other_branch(program, node, join) for join in program.joins):
            continue
        text = ast.unparse(node)
        if "is_available()" in text and re.search(r"['\"]cpu['\"]", text):
            return True
    return program.is_entry and not re.search(r"cuda|gpu|accelerator", module.text.replace("nccl", ""), re.IGNORECASE)


def _nccl_finding(program: Program, join: ast.Call, code: str, why: str) -> Finding:
    module = program.module
    backend = argument(join, "backend", 0)
    assert backend is not None
    name, imports = module.name_for("torch")
    text = f'{module.source(backend)} if {name}.cuda.is_available() else "gloo"'
    fix = Fix("Take gloo where there is no GPU", (module.replace(backend, text), *imports))
    return module.finding(code, backend, f"The backend is nccl, and {why}. Fix: gloo where there is no GPU.", fix)


def never_left(program: Program) -> Iterator[Finding]:
    """The group is joined and never left.

    Finds: A program that calls `init_process_group` and nowhere `destroy_process_group`. A file that only helps
    others to join is not reported.

    Why it hurts: torch warns at the end of every run, and may hang or abort there: the backend's threads are still at
    work while the interpreter goes down.

    The change: `destroy_process_group()` after the work is done, where the model is gone already. The fix puts it
    behind the call of the main function.

    Before:

        import torch.distributed as dist

        def main():
            dist.init_process_group("gloo")

        if __name__ == "__main__":
            main()

    After:

        import torch.distributed as dist

        def main():
            dist.init_process_group("gloo")

        if __name__ == "__main__":
            main()
            if dist.is_initialized():
                dist.destroy_process_group()
    """
    module = program.module
    if not program.joins or not program.is_entry or "destroy_process_group" in module.text:
        return
    called = {last_name(name) for _, name in module.calls} | program.guards.call_sites.keys()
    reached = [c for c in program.joins if (f := module.function_of(c)) is None or f.name in called]
    if not reached or any(
        re.search(r"clean_?up|shut_?down|destroy|tear_?down|finalize", last_name(n), re.I) for _, n in module.calls
    ):
        return
    yield module.finding(
        "ER104",
        reached[0],
        "The group is joined and never left: torch warns at the end of each run, and may hang there. "
        "Fix: destroy_process_group() when the work is done.",
        _leave_fix(program),
    )


def _leave_fix(program: Program) -> Fix | None:
    module = program.module
    if program.starts_ranks:
        return None
    for statement in module.tree.body:
        if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            last = statement.body[-1]
            if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and module.begins_line(last):
                name, imports = module.name_for("torch.distributed")
                end = module.span(last)[1]
                rest = module.text[end:].split("\n", 1)[0]
                blanks, newline = module.indent(last), module.newline
                lines = f"{blanks}if {name}.is_initialized():{newline}{blanks}    {name}.destroy_process_group()"
                at = end + len(rest.rstrip("\r"))
                return Fix(
                    "Leave the group behind the main function", (Edit(at, at, newline + lines), *imports), safe=False
                )
    return None


RULES = (
    Rule("ER101", "joined-too-late", {"python": joined_too_late}),
    Rule("ER102", "nccl-without-gpu-check", {"python": nccl_without_gpu_check}, fixes="safe"),
    Rule("ER103", "nccl-only", {"python": nccl_only}, default=False, fixes="safe"),
    Rule("ER104", "group-never-left", {"python": never_left}, fixes="unsafe"),
)
