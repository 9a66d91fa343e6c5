"""torchrun with all its flags, by everyrank: everyrank torchrun --nproc-per-node=2 train.py --lr 0.1"""

from __future__ import annotations

import argparse
import ast
import enum
import importlib.util
import os
import re
from collections.abc import Sequence
from types import CodeType
from typing import Any

from everyrank.elastic import engine_pool
from everyrank.errors import ConfigError
from everyrank.launch_env.detection import is_loopback_name
from everyrank.launch_env.torchelastic import is_flag_set

_KEY = re.compile(r"\+{0,2}(driver|env|run|distributed|app|rehearse|resume)(\.[\w.]+)?=")
_OURS = {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"}  # passed on to the ranks in any case
# Flags whose value is a setting of ours, as it is.
_SAME = {
    "nproc_per_node": "driver.nproc_per_node",
    "max_restarts": "driver.max_restarts",
    "monitor_interval": "driver.monitor_interval",
    "node_rank": "driver.node_rank",
    "master_addr": "driver.master_addr",
    "shutdown_timeout": "driver.shutdown_timeout_s",
    "role": "driver.role",
    "log_dir": "env.output_dir",
}
# Text, which Hydra would read as a number or as a list where it looks like one.
_TEXT = {
    *("driver.master_addr", "driver.rdzv_backend", "driver.rdzv_endpoint", "driver.rdzv_id", "driver.role"),
    "env.output_dir",
}
# What --rdzv-conf takes, with torchrun's defaults, in seconds: fixed nodes wait for each other, elastic ones, and these
# for more of them than are needed.
_WAITS = {"timeout": 900, "join_timeout": 600, "last_call_timeout": 30}
# Values that ask for nothing.
_HARMLESS = {"logs_specs": "default", "event_log_handler": "null"}
# What cannot be honoured, and why.
_CANNOT = {
    "logs_specs": "the logs are everyrank's own; run.show and run.prefix say what the console shows",
    "local_addr": "between nodes everyrank asks the kernel for the route to the master; set GLOO_SOCKET_IFNAME or "
    "NCCL_SOCKET_IFNAME for another interface",
    "numa_binding": "everyrank binds no rank to cores; start the program under numactl instead",
    "virtual_local_rank": "LOCAL_RANK picks the device here, and CUDA_VISIBLE_DEVICES is left alone",
    "event_log_handler": "everyrank records no torchelastic events",
    "duplicate_stdout_filters": "the rank's log has all its lines; grep finds them there",
    "duplicate_stderr_filters": "the rank's log has all its lines; grep finds them there",
}


def main(argv: Sequence[str]) -> int:
    """Run a program as torchrun's flags ask; returns the exit code."""
    from everyrank.cli.main import run

    if not {"-h", "--help"} & set(argv[:1]):
        engine_pool.fork_early()  # imports torch while this process reads the flags
    return run(translate(argv))


def translate(argv: Sequence[str]) -> list[str]:
    """The arguments of ``everyrank run`` for those of torchrun.

    Args:
        argv: Flags of the installed torch's torchrun (and its ``PET_`` variables), settings of everyrank
            (``key=value``), the program and its arguments.

    Raises:
        ConfigError: A flag that everyrank cannot honour, or one that contradicts a setting.
    """
    parser = torchrun_parser()
    parser.prog = "everyrank torchrun"
    keys, words = [], list(argv)
    args = parser.parse_args(words)
    while _KEY.match(args.training_script):
        keys.append(args.training_script)
        words.remove(args.training_script)
        args = parser.parse_args(words)
    given = _given(parser, words, args)
    settings = {"driver": "torchrun", **_settings(args, given)}
    for key in keys:
        name, _, value = key.lstrip("+").partition("=")
        if name in settings and (name == "driver" or settings[name] != value) and name in _named_by(given):
            raise ConfigError(
                f"{name}={value} was set, but the flags of torchrun say {name}={settings[name]}. Fix: leave one out."
            )
        settings.pop(name, None)
    program = [args.training_script, *args.training_script_args]
    if args.module:
        if args.no_python:
            raise ConfigError("--no-python and --module were both given. Fix: leave one out.")
        program.insert(0, "-m")
    if args.no_python and not args.run_path:
        settings["app.no_python"] = "true"
    return [*(_override(name, value) for name, value in settings.items()), *keys, "--", *program]


def torchrun_parser() -> argparse.ArgumentParser:
    """The parser of the installed torch's torchrun, without importing torch, which takes longer than all else here.

    Its definition and the three names that it needs are taken out of torch's files; where that fails, it is imported.
    """
    torch = importlib.util.find_spec("torch")
    try:
        folder = os.path.dirname(torch.origin)  # type: ignore[union-attr, arg-type]
        names: dict[str, Any] = {**vars(argparse), "os": os, "Enum": enum.Enum}
        for file, wanted in (
            ("distributed/argparse_util.py", ("env", "check_env")),
            ("numa/binding.py", ("AffinityMode",)),
            ("distributed/run.py", ("get_args_parser",)),
        ):
            exec(_definitions(os.path.join(folder, file), wanted), names)
        names["_AffinityMode"] = names["AffinityMode"]  # as run.py calls it
        return names["get_args_parser"]()
    except Exception:
        from torch.distributed.run import get_args_parser

        return get_args_parser()


def _definitions(file: str, wanted: Sequence[str]) -> CodeType:
    with open(file, encoding="utf-8") as source:
        nodes = ast.parse(source.read()).body
    return compile(ast.Module([node for node in nodes if getattr(node, "name", "") in wanted], []), file, "exec")


def _override(name: str, value: Any) -> str:
    from everyrank.cli.compose import as_text

    return f"{name}={as_text(value) if name in _TEXT else value}"


def _given(parser: argparse.ArgumentParser, words: list[str], args: argparse.Namespace) -> set[str]:
    """The flags that were given, on the command line or by a variable."""
    unset = object()
    asked = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    by_default = {name for name, value in vars(asked).items() if value is unset}
    return {name for name in vars(args) if name not in by_default or is_flag_set(name, os.environ)}


def _named_by(given: set[str]) -> set[str]:
    """The settings that the given flags are about."""
    names = {_SAME[flag] for flag in given if flag in _SAME}
    if "nnodes" in given:
        names |= {"driver.nnodes", "driver.min_nodes", "driver.max_nodes"}
    names |= {f"driver.{flag}" for flag in given if flag.startswith("rdzv_")}
    return names | {"driver"}


def _settings(args: argparse.Namespace, given: set[str]) -> dict[str, Any]:
    local = ("localhost", "127.0.0.1") if args.nnodes in ("1", "1:1") else ()
    for flag, why in _CANNOT.items():
        value = getattr(args, flag)
        if flag in given and value and value not in (_HARMLESS.get(flag), *local):
            raise ConfigError(f"--{flag.replace('_', '-')} was given, but everyrank cannot honour it: {why}.")
    settings: dict[str, Any] = {"driver.nproc_per_node": args.nproc_per_node}
    if args.nproc_per_node == "1":  # torchrun limits the threads of ranks that share a machine, and of no other
        settings["driver.threads_per_rank"] = 0
    settings.update({key: getattr(args, flag) for flag, key in _SAME.items() if flag in given})
    if args.master_port:  # 0 is any free port
        settings["driver.master_port"] = args.master_port
    settings.update(_nodes(args, given))
    settings.update(_output(args))
    unknown = sorted(set(args.signals_to_handle.split(",")) - _OURS - {""})
    if unknown:
        raise ConfigError(
            f"--signals-to-handle={args.signals_to_handle} was given, but everyrank passes on "
            f"{', '.join(sorted(_OURS))} and not {', '.join(unknown)}. Fix: leave it out."
        )
    return settings


def _nodes(args: argparse.Namespace, given: set[str]) -> dict[str, Any]:
    least, _, most = args.nnodes.partition(":")
    if not least.isdigit() or not (most or least).isdigit():
        raise ConfigError(f"--nnodes={args.nnodes} was given; it is a number of nodes, or MIN:MAX.")
    least, most = int(least), int(most or least)
    nodes: dict[str, Any] = (
        {"driver.nnodes": most} if least == most else {"driver.min_nodes": least, "driver.max_nodes": most}
    )
    if args.standalone:  # torchrun ignores what else is set about the rendezvous
        return {}
    host = args.rdzv_endpoint.rpartition(":")[0] or args.rdzv_endpoint
    named = {"driver.rdzv_id": args.rdzv_id} if "rdzv_id" in given else {}
    if most == 1 and (is_loopback_name(host) if host else args.rdzv_backend == "static"):
        return {**nodes, **named}  # nobody else is to come
    if args.rdzv_backend == "static":
        port = args.rdzv_endpoint.rpartition(":")[2] if host != args.rdzv_endpoint else ""
        nodes["driver.master_addr"] = host or args.master_addr
        nodes["driver.master_port"] = port or args.master_port or 29500
        nodes.update(named)
    elif args.rdzv_endpoint or most > 1:
        nodes["driver.rdzv_backend"] = args.rdzv_backend
        nodes["driver.rdzv_endpoint"] = args.rdzv_endpoint or "localhost:29400"  # torchrun's default
        nodes["driver.rdzv_id"] = args.rdzv_id
    nodes.update(_timeouts(args, is_elastic=least != most))
    return nodes


def _timeouts(args: argparse.Namespace, *, is_elastic: bool) -> dict[str, Any]:
    """The settings of ``--rdzv-conf``; ``timeout`` is the static backend's alone, as in torch."""
    waits = dict(_WAITS)
    for pair in filter(None, args.rdzv_conf.strip("'\"").split(",")):
        name, _, value = (part.strip() for part in pair.partition("="))
        if name not in waits or not value.isdigit():
            raise ConfigError(
                f"--rdzv-conf={name}={value} was given, but everyrank takes timeout, join_timeout and "
                "last_call_timeout, in whole seconds. The node that has the endpoint's address hosts the store, and "
                "one that is silent for 4 s has gone."
            )
        waits[name] = int(value)
    if args.rdzv_backend == "static":
        return {"driver.rdzv_timeout_s": max(waits["timeout"], 1)}
    last_call = {"driver.rdzv_last_call_s": waits["last_call_timeout"]} if is_elastic else {}
    return {"driver.rdzv_timeout_s": max(waits["join_timeout"], 1), **last_call}


def _output(args: argparse.Namespace) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if args.redirects not in ("0", "3"):
        raise ConfigError(
            f"--redirects={args.redirects} was given, but both streams of every rank are always in its log. "
            "everyrank takes 3, which keeps them off the console (run.show=failed), and 0."
        )
    if args.tee not in ("0", "3"):
        raise ConfigError(
            f"--tee={args.tee} was given, but both streams of every rank are always in its log. everyrank takes 3, "
            "which marks the lines with their rank (run.prefix=rank), and 0."
        )
    if args.local_ranks_filter not in ("", "0"):
        raise ConfigError(
            f"--local-ranks-filter={args.local_ranks_filter} was given, but everyrank shows all ranks, rank 0 "
            "(--local-ranks-filter=0, run.show=main), or failed ranks at the end (run.show=failed)."
        )
    if args.tee == "3":
        shown["run.prefix"] = "rank"
    if args.redirects == "3" and args.tee != "3":
        shown["run.show"] = "failed"
    elif args.local_ranks_filter == "0":
        shown["run.show"] = "main"
    return shown
