"""``python -m everyrank.drivers.node --config FILE driver.KEY=VALUE ...``: one node of a run.

For schedulers that start one task a node: each runs torch's engine with the ranks of its node. The configuration is
the resolved one that the launching process wrote; the settings are those of ``driver=torchrun``.

With ``--attached`` the launching process holds the other end of the standard input (``ssh.py``): its first line has the
secret variables, a number on a line is a signal to pass on, its end is the end of the launching process, and what went
wrong is told by that process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, TextIO

from everyrank.config.schema import build
from everyrank.diagnosis.judge import conclude, last_block
from everyrank.diagnosis.watch_config import WatchConfig
from everyrank.diagnosis.watcher import Watcher
from everyrank.drivers.driver import LaunchRequest
from everyrank.drivers.torchrun import TorchrunDriver
from everyrank.drivers.torchrun_config import TorchrunConfig
from everyrank.elastic import engine_pool
from everyrank.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from everyrank.program.command import Program
from everyrank.program.main_module import fresh_path


def main(argv: Sequence[str]) -> int:
    """Run the ranks of this node; returns the exit code."""
    arguments = list(argv)
    config_file = arguments.pop(0).removeprefix("--config=")
    attached = "--attached" in arguments
    if attached:
        arguments.remove("--attached")
    engine_pool.fork_early()  # imports torch while this process reads the configuration
    path = fresh_path()
    sys.path.insert(0, os.getcwd())
    if attached:
        orders = os.fdopen(os.dup(sys.stdin.fileno()))
        os.environ.update(json.loads(orders.readline() or "{}"))  # secrets
        threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    try:
        return _run(config_file, arguments, path, attached)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _listen(orders: TextIO) -> None:
    for line in orders:
        os.kill(os.getpid(), int(line))
    os.kill(os.getpid(), signal.SIGTERM)


def _run(config_file: str, arguments: list[str], path: list[str], attached: bool) -> int:
    from omegaconf import OmegaConf

    from everyrank.config import plain_yaml

    with open(config_file, encoding="utf-8") as file:
        text = file.read()
    run = plain_yaml.load(text)
    settings: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.removeprefix("driver.").partition("=")
        settings[key] = plain_yaml.load(value)
    driver = TorchrunDriver(build(TorchrunConfig, settings, what="command line of the node"))
    program = run["run"]["program"]
    request = LaunchRequest(
        config_file=config_file,
        config_text=text,
        run_dir=run["run"]["dir"],
        cwd=os.getcwd(),
        env=OmegaConf.to_container(OmegaConf.create(run["env"]["variables"]), resolve=True),  # type: ignore[arg-type]
        program=None if program is None else Program.from_mapping(program),
        sys_path=tuple(sys.path if program is None else path),
        device=run["distributed"]["device"],
        timeout_s=run["distributed"]["timeout_s"],
        preload=tuple(run["app"].get("preload") or ()),
        watch=build(WatchConfig, run["watch"], what="watch section of the run"),
    )
    os.makedirs(request.log_dir, exist_ok=True)
    plan = driver.plan(request)
    say = (lambda line: None) if attached else None  # the launching process watches as well, and says it there
    with Watcher(request.run_dir, request.watch, plan.world_size or 0, say=say, shared=True):
        outcome = driver.run(plan, request)
    code = outcome.exit_code
    if attached and outcome.failures:
        return code
    if code == EXIT_PREEMPTED:
        print(f"preempted: a checkpoint is saved in {request.run_dir}", file=sys.stderr, flush=True)
    elif code:
        verdict = conclude(request.run_dir, outcome.failures, world_size=outcome.world_size)
        if told := last_block(outcome, verdict):
            print(told, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
