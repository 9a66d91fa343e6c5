"""A program on one rank, from its variables to its exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from everyrank.diagnosis.frames import raised_at
from everyrank.diagnosis.rank import reporter
from everyrank.diagnosis.rank.record import record_error
from everyrank.diagnosis.rank.stack_dump import register_stack_dump
from everyrank.diagnosis.rank_files import error_file, log_file
from everyrank.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from everyrank.launch_env.detection import detect
from everyrank.launch_env.guard import add_startup
from everyrank.launch_env.process_environment import SUPERVISED
from everyrank.launch_env.torchelastic import line_prefix
from everyrank.program.command import EXECUTABLE, MODULE, Program
from everyrank.program.main_module import run_module, run_script
from everyrank.program.output import divert_output, log_only
from everyrank.program.variables import rank_variables


def run_program(program: Program, run_dir: str, *, prefix: str, show: str, local_rank: int | None) -> int:
    """Run a program in this process, or in its place; an executable does not return.

    Args:
        program: What to run.
        run_dir: Folder of the run.
        prefix: ``auto``, ``rank`` or ``none``: what stands before each line on the console.
        show: ``all``, ``main`` or ``failed``: whose lines the console shows.
        local_rank: What the legacy launcher put on the command line, which the program expects there.

    Returns:
        The exit code.

    Raises:
        LaunchEnvironmentError: The launcher's variables are half-set.
    """
    environment = detect(argv=[] if local_rank is None else [f"--local-rank={local_rank}"])
    rank, several = environment.rank, environment.world_size > 1
    log_dir = os.path.join(run_dir, "logs")
    os.environ.update(rank_variables(environment, os.environ, error_file(log_dir, rank)))
    if environment.launcher != "python" or not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        tagged = several and (prefix == "rank" or (prefix == "auto" and sys.stdout.isatty()))
        shown = not several or show == "all" or (show == "main" and rank == 0)
        mark = line_prefix(environment, os.environ) if tagged else ""
        divert_output(log_file(log_dir, rank), prefix=mark, on_console=shown)
    reporter.start()
    register_stack_dump()
    argv = list(program.argv)
    if local_rank is not None:
        argv.insert(1, f"{program.local_rank_option or '--local-rank'}={local_rank}")
    if program.kind == EXECUTABLE:
        return _execute(argv)
    run = run_module if program.kind == MODULE else run_script
    return _exit_code(lambda: run(argv), rank, log_dir)


def _execute(argv: list[str]) -> int:
    """Become the program; if it is a Python of any kind, it reports as well."""
    os.environ["PYTHONPATH"] = add_startup(os.environ.get("PYTHONPATH", ""))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored stays so in a new program
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"error: cannot run {argv[0]!r}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _exit_code(run: Callable[[], None], rank: int, log_dir: str) -> int:
    """Run it and answer what it raises as the interpreter would, with a record of it for the launcher."""
    try:
        run()
    except SystemExit as end:
        reporter.ended(raised_at(end.__traceback__))
        if end.code is None or isinstance(end.code, int):
            return end.code or EXIT_OK
        print(end.code, file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt as error:
        _show(error, quiet=os.environ.get(SUPERVISED) == "1")
        return EXIT_INTERRUPTED
    except BaseException as error:
        error.__traceback__ = _without_ours(error.__traceback__)
        record = record_error(error, rank, EXIT_FAILURE, log_dir)
        _show(error, quiet=record["is_written"] and os.environ.get(SUPERVISED) == "1")
        reporter.told(record)
        return EXIT_FAILURE
    reporter.ended()
    return EXIT_OK


def _show(error: BaseException, *, quiet: bool = False) -> None:
    if quiet:
        log_only(sys.stderr)  # the launching process says it, once for all ranks and after everything else
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except Exception:
        traceback.print_exception(error)


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the program's own first frame on."""
    here = os.path.dirname(__file__)
    while trace is not None and os.path.dirname(trace.tb_frame.f_code.co_filename) == here:
        if trace.tb_next is None:
            break
        trace = trace.tb_next
    return trace
