"""The one entry that a started process runs: read one resolved config, call the app, say how it ended.

``python -m everyrank.worker --config RUN/run.yaml``, on every rank, by whatever launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everyrank.diagnosis.rank import reporter
from everyrank.diagnosis.rank.record import record_error, render
from everyrank.diagnosis.rank_files import log_file
from everyrank.elastic.lifetime import die_with_parent
from everyrank.elastic.process.leaving import finish_after
from everyrank.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PREEMPTED,
    ConfigError,
    Preempted,
    UserError,
    did_you_mean,
)
from everyrank.launch_env.process_environment import SUPERVISED
from everyrank.runtime import no_terminal, torch_cures

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``python -m everyrank.worker``."""
    parser = argparse.ArgumentParser(prog="python -m everyrank.worker", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="the resolved config file of the run")
    # torch.distributed.launch without --use-env appends one of these; launch_env reads it.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch_cures.install()
    if os.environ.get(SUPERVISED) == "1":
        no_terminal.install()
    die_with_parent()  # an agent that is killed must not leave its ranks training on
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder that -m has put there; an app gets it back, a program has its own
    return _run_file(arguments.config, arguments.local_rank)


def run_rank(config_file: str) -> None:
    """Run what a config file says in this process and exit with its code; what our own engine calls."""
    code = _run_file(config_file, None)
    if code:
        raise SystemExit(code)


def _run_file(config_file: str, local_rank: int | None) -> int:
    from everyrank.config import plain_yaml

    if not os.path.isfile(config_file):
        print(f"error: the config file {config_file} does not exist", file=sys.stderr)
        return EXIT_BAD_INPUT
    with open(config_file, encoding="utf-8") as file:
        text = file.read()
    run = plain_yaml.load(text)["run"]
    if run["program"] is not None:
        return run_program(run, local_rank)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    cfg = OmegaConf.create(text)
    try:
        OmegaConf.resolve(cfg)  # what the launching process read from the environment is in this one's, not in the file
    except OmegaConfBaseException as error:
        print(f"error: {config_file}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return run_app(cfg)[0]  # type: ignore[arg-type]


def run_program(run: Mapping[str, Any], local_rank: int | None = None) -> int:
    """Run somebody's own program on this rank.

    Args:
        run: The ``run`` section of the run's configuration.
        local_rank: What the legacy launcher put on the command line.

    Returns:
        The exit code.
    """
    from everyrank.program import rank
    from everyrank.program.command import Program

    _rehearse()
    program = Program.from_mapping(run["program"])
    try:
        return rank.run_program(program, run["dir"], prefix=run["prefix"], show=run["show"], local_rank=local_rank)
    except UserError as error:
        return _report(error, 0, os.path.join(run["dir"], "logs"), EXIT_BAD_INPUT)


def run_app(cfg: DictConfig) -> tuple[int, Any]:
    """Run the app on this rank.

    Args:
        cfg: The resolved config of the run.

    Returns:
        The exit code, and what the app returned.
    """
    _rehearse()
    from everyrank.launch_env.detection import detect
    from everyrank.runtime.output import tee_output

    log_dir = os.path.join(cfg.run.dir, "logs")
    rank = 0
    reporter.start()
    try:
        environment = detect()
        rank = environment.rank
        with tee_output(log_file(log_dir, rank)):
            return _guarded_run(cfg, rank, log_dir)
    except UserError as error:
        return _report(error, rank, log_dir, EXIT_BAD_INPUT), None


def _rehearse() -> None:
    """In a rank that is to rehearse and was forked: it did not start as a Python of its own."""
    if os.environ.get("EVERYRANK_REHEARSE"):
        from everyrank.rehearsal import install

        install()


def _guarded_run(cfg: DictConfig, rank: int, log_dir: str) -> tuple[int, Any]:
    from everyrank.diagnosis.rank.stack_dump import register_stack_dump
    from everyrank.runtime.logs import setup_logging

    # SIGQUIT shows where a rank is, also inside a collective; not on stderr, which driver=launch keeps from people.
    register_stack_dump(file=sys.__stdout__)
    setup_logging(rank, cfg.run.get("log_level"), log_file(log_dir, rank))
    result_file = os.path.join(cfg.run.dir, "result.json")
    if rank == 0:
        with contextlib.suppress(OSError):
            os.unlink(result_file)  # an earlier run's
    try:
        result = load_app(cfg.app._target_).run(cfg)
        if rank == 0:
            _write_result(result_file, result)
    except Preempted as preempted:
        if rank == 0:
            print(f"{preempted}", file=sys.stderr)
        return EXIT_PREEMPTED, None
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED, None  # an app without a PreemptionWatch: the launching process says it, once
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or EXIT_OK, None
        return _report(error, rank, log_dir, EXIT_FAILURE), None
    except UserError as error:
        return _report(error, rank, log_dir, EXIT_BAD_INPUT), None
    except Exception as error:
        return _report(error, rank, log_dir, EXIT_FAILURE), None
    reporter.ended()
    return EXIT_OK, result


def load_app(target: str) -> Any:
    """Import and make the app ``package.module.Class``.

    Raises:
        ConfigError: It cannot be imported; the message holds the reason.
    """
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        cause = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"app._target_={target} was set, but importing {module_name} failed: "
            f"{type(error).__name__}: {error} (at {cause.filename}:{cause.lineno}). "
            "Install or mend what it imports."
        ) from error
    if not hasattr(module, class_name):
        raise ConfigError(
            f"app._target_={target} was set, but {module_name} has no {class_name!r}."
            f"{did_you_mean(class_name, dir(module))}"
        )
    return getattr(module, class_name)()


def _report(error: BaseException, rank: int, log_dir: str, exit_code: int) -> int:
    record = record_error(error, rank, exit_code, log_dir)
    text = render(record)
    with contextlib.suppress(OSError), open(log_file(log_dir, rank), "a", encoding="utf-8") as log:
        log.write(text + "\n")
    # Under one of our launchers the launching process says it, once for all ranks and after everything else.
    if os.environ.get(SUPERVISED) != "1" or not (record["is_written"] or record["lost_peer"]):
        print(text, file=sys.__stderr__, flush=True)
    reporter.told(record)
    return exit_code


def _write_result(path: str, result: Any) -> None:
    if result is None:
        return
    try:
        text = json.dumps(result, indent=2)
    except (TypeError, ValueError) as error:
        print(f"notice: the app's result is not kept: {path} cannot hold it ({error})", file=sys.stderr)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        from everyrank.checkpoint.folder import said_plainly  # with torch, which an app may not need

        with said_plainly(Path(path)):
            raise


if __name__ == "__main__":
    finish_after(main)
