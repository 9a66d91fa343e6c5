"""The rule about starting as one process: ER105."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Finding, Fix
from everyrank.lint.module import argument, constant
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

_ALONE = 'RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"'


def cannot_start_alone(program: Program) -> Iterator[Finding]:
    """The program joins by the environment, and cannot start without a launcher.

    Finds: `init_process_group` with `env://` (the default) on the way of every start, in a program that never looks
    whether a launcher has set `RANK`.

    Why it hurts: `python train.py` ends with "environment variable RANK expected, but not set": no debugger, no
    profiler, no quick try.

    The change: Without a launcher be a world of one. The fix sets the five variables where `RANK` is not set; port 0 is
    any free one.

    Before:

        import os
        import torch.distributed as dist

        dist.init_process_group("gloo")
        print(dist.get_rank())
        dist.destroy_process_group()

    After:

        import os
        import torch.distributed as dist

        if "RANK" not in os.environ:  # no launcher: a world of one
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("gloo")
        print(dist.get_rank())
        dist.destroy_process_group()
    """
    module = program.module
    if program.starts_ranks or not program.is_entry or _looks_for_launcher(program):
        return
    for join in program.joins:
        if not _joins_by_environment(program, join):
            continue
        if not program.guards.runs_on_every_rank(join) or any(isinstance(p, ast.Try) for p in module.ancestors(join)):
            continue
        name, imports = module.name_for("os")
        statement = module.statement_of(join)
        fix = None
        if module.begins_line(statement):
            line = (
                f'if "RANK" not in {name}.environ:  # no launcher: a world of one\n    {name}.environ.update({_ALONE})'
            )
            fix = Fix("Be a world of one without a launcher", (module.insert_before(statement, line), *imports))
        yield module.finding(
            "ER105",
            join,
            "python alone ends here: the group is joined by the environment, which only a launcher sets. "
            "Fix: without a launcher be a world of one.",
            fix,
        )


def _joins_by_environment(program: Program, join: ast.Call) -> bool:
    method, rank, size = argument(join, "init_method", 1), argument(join, "rank"), argument(join, "world_size")
    if (method is not None and constant(method) != "env://") or argument(join, "store") is not None:
        return False
    if any(k.arg is None for k in join.keywords) or (rank is not None and not program.is_global_rank(rank)):
        return False
    if size is None:
        return True
    # A number of the program's own would wait for ranks that nobody starts.
    values = [size, *(program.values_of(size) if isinstance(size, ast.Name | ast.Attribute) else ())]
    return any("WORLD_SIZE" in ast.unparse(value) for value in values)


def _looks_for_launcher(program: Program) -> bool:
    text = program.module.text
    return bool(
        re.search(r"['\"](?:RANK|WORLD_SIZE|LOCAL_RANK|MASTER_PORT)['\"] (?:not )?in ", text)
        or re.search(r"environ\.(?:setdefault|update)\([^)]*(?:RANK|WORLD_SIZE)", text)
        or re.search(r"environ\[['\"](?:RANK|WORLD_SIZE)['\"]\] *=[^=]", text)
        or re.search(r"is_torchelastic_launched|is_torchrun", text)
        or re.search(
            r"(?:environ\.get|getenv)\(['\"](?:WORLD_SIZE|RANK|LOCAL_RANK)['\"]"
            r"(?:, *(?:None|['\"]?-?1['\"]?))?\)[^\n]*(?:[><!=]=?|is) ",
            text,
        )
    )


RULES = (Rule("ER105", "cannot-start-alone", {"python": cannot_start_alone}, fixes="safe"),)
