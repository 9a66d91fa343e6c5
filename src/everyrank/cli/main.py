"""The command line: compose, validate, plan, launch.

``python run.py driver=D env=E app=A key=value ...`` is ``everyrank run ...``. Hydra composes the configuration once, in
this process; the workers read the resolved file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from everyrank.cli.console import outlive_console
from everyrank.cli.program_arguments import split_program
from everyrank.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, UserError, did_you_mean
from everyrank.program.main_module import fresh_path

if TYPE_CHECKING:
    from omegaconf import DictConfig

_USAGE = """\
usage: everyrank COMMAND ...

  run            run a program of yours on every rank: everyrank run -n 2 -- train.py --lr 0.1
                 or an app: everyrank run driver=torchrun app=hello_dist
                 (everyrank run --help lists the groups; python run.py is the same)
{commands}
everyrank COMMAND --help tells more of each.
"""

# Each is a module of this room with a line of help as its docstring's first line and main(argv) -> exit code.
_ROOM = "everyrank.cli.commands"
_COMMANDS = ["certify", "check", "checkpoints", "doctor", "export", "plan", "replay", "report", "stacks", "torchrun"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the ``everyrank`` command; returns the exit code."""
    if argv is None:
        outlive_console()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE.format(commands="".join(f"  {name:<14} {_help_line(name)}\n" for name in _COMMANDS)))
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    if arguments[0] == "--version":
        from everyrank import __version__

        print(f"everyrank {__version__}")
        return EXIT_OK
    # Settings may come first, as in ``everyrank driver=slurm doctor``.
    at = next((k for k, word in enumerate(arguments) if "=" not in word), None)
    if at is None:
        return _fail(f"no command was given. Fix: everyrank run {' '.join(arguments)}")
    command, rest = arguments[at], [*arguments[:at], *arguments[at + 1 :]]
    if command == "run":
        return run(rest)
    if command not in _COMMANDS:
        hint = did_you_mean(command, [*_COMMANDS, "run"])
        return _fail(f"{command!r} is no command of everyrank.{hint} Run everyrank --help for the list.")
    import importlib

    try:
        return importlib.import_module(f"{_ROOM}.{command}").main(rest)
    except UserError as error:
        return _fail(str(error))


def _help_line(command: str) -> str:
    import ast
    import importlib.util

    spec = importlib.util.find_spec(f"{_ROOM}.{command}")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        return (ast.get_docstring(ast.parse(file.read())) or "").split("\n")[0]


def run(argv: Sequence[str]) -> int:
    """Compose the configuration that ``argv`` (Hydra's grammar) describes and run its app; returns the exit code.

    Args:
        argv: Settings, and behind ``--`` a program of the user's own with its arguments.
    """
    sys_path = fresh_path()
    try:
        argv, program = split_program(argv)
    except UserError as error:
        return _fail(str(error))
    if _will_need_engine(argv):
        from everyrank.elastic import engine_pool

        engine_pool.fork_early()  # imports torch while this process composes
    from everyrank.elastic.process.torch_bound import check_torch

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an app's _target_ may lie beside the user's own run.py
    if {"--help", "-h"} & set(argv) and not any(arg.startswith("app=") for arg in argv):
        argv = [*argv, "app=hello_dist"]  # help is shown for a whole configuration
    codes: list[int] = []
    try:
        check_torch()
        _compose_and_launch(list(argv), program, sys_path, codes)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; no rank is left", file=sys.stderr)
        return EXIT_INTERRUPTED
    return max(codes, default=EXIT_OK)


def _will_need_engine(argv: Sequence[str]) -> bool:
    """Guess before composing; a wrong guess costs an unused child or a later start, nothing else."""
    from everyrank.launch_env.detection import detect

    try:
        if not sys.platform.startswith("linux") or detect().world_size > 1:
            return False
    except UserError:
        return False  # told in a moment, by the launch
    quiet = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version", "driver.dry_run=true"}
    return "driver=torchrun" in argv and not quiet & {arg.split("=")[0] if arg[0] == "-" else arg for arg in argv}


def _compose_and_launch(argv: list[str], program: list[str] | None, sys_path: list[str], codes: list[int]) -> None:
    from everyrank.cli.compose import for_each_composed
    from everyrank.cli.launching import check_jobs, launch_config

    def task(cfg: DictConfig) -> Any:
        code, result = launch_config(cfg, program, sys_path)
        codes.append(code)
        return result

    if {"-m", "--multirun"} & set(argv) and not any(arg.lstrip("+").startswith("hydra/") for arg in argv):
        check_jobs(argv, program)  # a sweeper of another kind finds its jobs by their results
    for_each_composed(argv, task)


def _fail(message: str) -> int:
    print(message if message.startswith("error:") else f"error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT


def run_main() -> int:
    """Entry of ``run.py``."""
    outlive_console()
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
