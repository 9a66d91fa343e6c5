"""Rules about the commands that start a program: ER004, ER007, ER008."""

from __future__ import annotations

import ast
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from everyrank.lint.finding import Edit, Finding, Fix
from everyrank.lint.module import constant
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule
from everyrank.lint.script import Command, Script

_OLD = "torch.distributed.launch"
_PYTHON = re.compile(r"(?:^|/)python(?:3(?:\.\d+)?)?$")


def old_launcher(script: Script) -> Iterator[Finding]:
    """The deprecated launcher torch.distributed.launch is used.

    Finds: `python -m torch.distributed.launch` in shell and Slurm scripts, in shell blocks of Markdown and
    reStructuredText pages, in shell lines of notebooks, in commands of YAML and JSON files, and in lists of
    arguments in Python.

    Why it hurts: It is deprecated since torch 1.9 and says so at every start. It passes `--local-rank` to the program,
    which programs written for torchrun refuse.

    The change: `torchrun` takes the same options. With `--use_env` nothing else changes, and the fix is safe, as it is
    where the program is found and reads `LOCAL_RANK`. Elsewhere the program must first read `LOCAL_RANK` (ER003 mends
    that), and the fix is unsafe.

    Before (bash):

        python -m torch.distributed.launch --nproc_per_node=4 --use_env train.py --epochs 90

    After (bash):

        torchrun --nproc_per_node=4 train.py --epochs 90
    """
    for command in script.commands:
        index = _module_index(command)
        if index is None:
            continue
        words = command.words
        options = itertools.takewhile(lambda word: not word.text.endswith(".py"), words[index + 1 :])
        use_env = [w for w in options if w.text in ("--use_env", "--use-env")]
        edits = []
        interpreter = words[index - 2] if index >= 2 else None
        if interpreter and _PYTHON.search(interpreter.text) and "/" not in interpreter.text:
            edits.append(Edit(interpreter.start, words[index].end, "torchrun"))
        else:
            edits.append(Edit(words[index].start, words[index].end, "torch.distributed.run"))
        for word in use_env:
            begin = words[words.index(word) - 1].end
            if script.text[begin : word.start].strip():  # a line continuation stands before it
                begin = word.start
            edits.append(Edit(begin, word.end, ""))
        safe = bool(use_env) or _reads_local_rank(script, command)
        yield Finding(
            "ER004",
            f"{_OLD} is deprecated, and passes --local-rank to the program. Fix: torchrun, with the same options"
            + ("." if safe else "; the program must read LOCAL_RANK."),
            words[index].start,
            words[index].end,
            Fix("Start it with torchrun", tuple(edits), safe=safe),
        )


def _module_index(command: Command) -> int | None:
    for index, word in enumerate(command.words[1:], 1):
        if word.text == _OLD and command.words[index - 1].text == "-m":
            return index
    return None


def _reads_local_rank(script: Script, command: Command) -> bool:
    """Whether the program that is started is found beside the script, and reads LOCAL_RANK."""
    program = next((w.text for w in command.words if w.text.endswith(".py")), "")
    if not program or "$" in program or not script.path:
        return False
    for folder in (Path(script.path).parent, Path(script.path).parent.parent, Path.cwd()):
        path = folder / program
        if path.is_file():
            return "LOCAL_RANK" in path.read_text(encoding="utf-8", errors="replace")
    return False


def old_launcher_in_python(program: Program) -> Iterator[Finding]:
    """The same in a list of arguments."""
    module = program.module
    for node in module.of_type(ast.Constant):
        parent = module.parents[node]
        if (
            node.value == _OLD
            and isinstance(parent, ast.List | ast.Tuple)
            and "-m" in {constant(e) for e in parent.elts}
        ):
            quote = module.source(node)[-1]
            fix = Fix(
                "Start it with torchrun's module",
                (module.replace(node, f"{quote}torch.distributed.run{quote}"),),
                safe=False,
            )
            yield module.finding(
                "ER004",
                node,
                f"{_OLD} is deprecated, and passes --local-rank to the program. Fix: torch.distributed.run (torchrun); "
                "the program must read LOCAL_RANK.",
                fix,
            )


def fixed_port(script: Script) -> Iterator[Finding]:
    """A launch on one node has a fixed port.

    Finds: `--master_port=29501` (also `MASTER_PORT=29501`) in the command of a launch on one node.

    Why it hurts: The second run on the machine ends with "address already in use", and so does a restart that comes
    before the system has given the port back.

    The change: `torchrun --standalone`, which takes a free port. Several nodes must agree on one, and are not reported.

    Before (bash):

        torchrun --nproc_per_node=4 --master_port=29501 train.py

    After (bash):

        torchrun --standalone --nproc_per_node=4 train.py
    """
    for command in script.commands:
        if not _is_launch(command) or _several_nodes(script, command):
            continue
        words = command.words
        for index, word in enumerate(words):
            match = re.fullmatch(r"--master[-_]port(?:=(\d+))?", word.text)
            value = match and (match[1] or (words[index + 1].text if index + 1 < len(words) else ""))
            if match and value and value.isdigit() and value != "0":
                yield Finding(
                    "ER007",
                    f"Port {value} is fixed: a second run on this machine finds it taken. Fix: torchrun --standalone.",
                    word.start,
                    word.end,
                )


def _is_launch(command: Command) -> bool:
    return any(
        re.fullmatch(r"(?:.*/)?torchrun|torch\.distributed\.(?:launch|run)", word.text) for word in command.words
    )


def _several_nodes(script: Script, command: Command) -> bool:
    text = " ".join(word.text for word in command.words)
    match = re.search(r"--nnodes[= ](\S+)", text)
    return bool(match and match[1] != "1") or script.slurm_options.get("nodes", "1") != "1"


def torchrun_for_each_task(script: Script) -> Iterator[Finding]:
    """Slurm starts several tasks a node, and each of them starts several ranks.

    Finds: A Slurm script with `--ntasks-per-node` above one whose `srun` starts torchrun with several processes.

    Why it hurts: Four tasks with four ranks each are sixteen processes on four GPUs, which meet at the same port.

    The change: One task a node for torchrun; or one task a GPU, and `srun python train.py` without torchrun.

    Before (bash):

        #SBATCH --nodes=2
        #SBATCH --ntasks-per-node=4
        srun torchrun --nnodes=2 --nproc_per_node=4 train.py

    After (bash):

        #SBATCH --nodes=2
        #SBATCH --ntasks-per-node=1
        srun torchrun --nnodes=2 --nproc_per_node=4 train.py
    """
    tasks = script.slurm_options.get("ntasks-per-node", "1")
    for command in script.commands:
        if not command.words or os.path.basename(command.words[0].text) != "srun" or not _is_launch(command):
            continue
        text = " ".join(word.text for word in command.words)
        own = re.search(r"--ntasks-per-node[= ](\d+)", text)
        number = own[1] if own else tasks
        ranks = re.search(r"--nproc[-_]per[-_]node[= ](\S+)", text)
        if number.isdigit() and int(number) > 1 and ranks and ranks[1] != "1":
            yield Finding(
                "ER008",
                f"srun starts {number} tasks on a node, and each starts {ranks[1]} ranks. "
                "Fix: --ntasks-per-node=1, or srun python without torchrun.",
                command.words[0].start,
                command.words[0].end,
            )


RULES = (
    Rule("ER004", "old-launcher", {"shell": old_launcher, "python": old_launcher_in_python}, fixes="safe"),
    Rule("ER007", "fixed-port", {"shell": fixed_port}, default=False),
    Rule("ER008", "torchrun-for-each-task", {"shell": torchrun_for_each_task}),
)
