"""The only reader of launcher variables: which launcher started this process, and who it is in the run.

Explicit arguments win over variables, and of the variables the innermost launcher's win: torchrun inside a Slurm
allocation or under ``mpirun`` is torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from everyrank.launch_env.legacy_arguments import local_rank_argument
from everyrank.launch_env.mpi import detect_openmpi, detect_pmi
from everyrank.launch_env.process_environment import ProcessEnvironment, check, environment_error, read_int, require_int
from everyrank.launch_env.slurm import detect_slurm

__all__ = ["ProcessEnvironment", "detect", "detect_with_arguments"]

DEFAULT_MASTER_ADDR = "localhost"
DEFAULT_MASTER_PORT = 12355
_RUN_IDS = ("TORCHELASTIC_RUN_ID", "RAY_JOB_ID", "EVERYRANK_LAUNCH_ID")
_LOOPBACK_NAMES = frozenset({"localhost", "ip6-localhost", "::1"})


def detect(environ: Mapping[str, str] | None = None, argv: Sequence[str] | None = None) -> ProcessEnvironment:
    """Tell which launcher started this process and the process's place in the run.

    ``torch.distributed.launch`` sets the same variables as torchrun; it is told by the ``--local-rank=N`` it puts on
    the command line, and with ``--use-env`` it *is* torchrun.

    Args:
        environ: Environment variables; those of this process by default.
        argv: Command line, where old launchers put ``--local-rank``; ``sys.argv`` by default.

    Returns:
        The process's environment; world size 1 where no launcher is recognised.

    Raises:
        LaunchEnvironmentError: The variables are half-set, are no numbers or contradict each other. The message
            lists every launcher variable that is set, what is missing and how to mend it.
    """
    environ = os.environ if environ is None else environ
    argv = sys.argv if argv is None else argv
    detectors: tuple[Callable[[Mapping[str, str], Sequence[str]], ProcessEnvironment | None], ...] = (
        _detect_torch_variables,
        lambda variables, _: detect_openmpi(variables),
        lambda variables, _: detect_slurm(variables),
        lambda variables, _: detect_pmi(variables),
    )
    for detector in detectors:
        found = detector(environ, argv)
        if found is not None:
            return check(found, environ)
    for name, other in (("WORLD_SIZE", "RANK"), ("LOCAL_RANK", "RANK")):
        if environ.get(name):
            require_int(environ, other, name)
    return ProcessEnvironment()


def detect_with_arguments(
    environ: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | str | None = None,
) -> ProcessEnvironment:
    """Like :func:`detect`, with explicit arguments that win over variables.

    With both ``rank`` and ``world_size`` no rank variable is read, except that ``LOCAL_RANK`` is used where ``RANK``
    says the same rank. The master's address and port come from the arguments, else from MASTER_ADDR and MASTER_PORT,
    else they are localhost and 12355.

    Raises:
        LaunchEnvironmentError: Only one of ``rank`` and ``world_size`` is given and no launcher gives the other, or
            the numbers contradict each other.
    """
    environ = os.environ if environ is None else environ
    port = _parse_port(master_port, environ)
    if rank is None or world_size is None:
        found = detect(environ, argv)
        if (rank, world_size) != (None, None) and found.launcher == "python":
            given, missing = ("rank", "world_size") if world_size is None else ("world_size", "rank")
            raise environment_error(
                f"{given} was passed without {missing}, and no launcher variable gives it",
                environ,
                f"pass both rank and world_size, or neither and start the program with a launcher (not only {given}).",
            )
    else:
        found = _from_arguments(environ, rank, world_size, local_rank, master_addr, port)
    changes: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "local_rank": local_rank,
        "master_addr": master_addr,
        "master_port": port,
    }
    return check(replace(found, **{name: value for name, value in changes.items() if value is not None}), environ)


def is_loopback_name(host: str | None) -> bool:
    """Tell whether ``host`` names this machine's loopback, so that a run that meets there is on one machine."""
    return host is not None and (host.lower() in _LOOPBACK_NAMES or host.startswith("127."))


def _from_arguments(
    environ: Mapping[str, str],
    rank: int,
    world_size: int,
    local_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
) -> ProcessEnvironment:
    same = environ.get("RANK") == str(rank) and environ.get("WORLD_SIZE") == str(world_size)
    if same:  # the caller passes on what the launcher said: keep what else the launcher said
        return detect(environ, [])
    addr = master_addr or environ.get("MASTER_ADDR") or DEFAULT_MASTER_ADDR
    single = is_loopback_name(addr)
    local = local_rank if local_rank is not None else (rank if single else read_int(environ, "LOCAL_RANK", 0))
    assert local is not None
    local_size = world_size if single else max(read_int(environ, "LOCAL_WORLD_SIZE", 1) or 1, local + 1)
    return ProcessEnvironment(
        launcher="spawn",
        detected_by="the arguments rank and world_size",
        rank=rank,
        local_rank=local,
        world_size=world_size,
        local_world_size=local_size,
        node_rank=0 if single else rank // max(local_size, 1),
        num_nodes=1 if single else -(-world_size // max(local_size, 1)),
        master_addr=addr,
        master_port=master_port or read_int(environ, "MASTER_PORT", DEFAULT_MASTER_PORT),
        run_id="",
        restart_count=0,
    )


def _detect_torch_variables(environ: Mapping[str, str], argv: Sequence[str]) -> ProcessEnvironment | None:
    """RANK and WORLD_SIZE: torchrun, torch.distributed.launch, Ray Train, Kubernetes operators, our own drivers."""
    argument = local_rank_argument(argv)
    if not environ.get("RANK"):
        if argument is not None and not {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"} & set(environ):
            require_int(environ, "RANK", "the command-line option --local-rank")
        return None
    rank = require_int(environ, "RANK", "RANK")
    world_size = require_int(environ, "WORLD_SIZE", "RANK")
    local_rank = _local_rank(environ, argument)
    elastic = "TORCHELASTIC_RUN_ID" in environ
    addr = environ.get("MASTER_ADDR") or None
    # A loopback master: all are on this machine. Not so in Kubernetes, where some operators tell the master's pod so.
    on_loopback = is_loopback_name(addr) and "KUBERNETES_SERVICE_HOST" not in environ
    if on_loopback:
        local_rank = rank if local_rank is None else local_rank
        default_local_size = world_size
    else:
        default_local_size = 1 if local_rank is None else min(world_size, local_rank + 1)
    local_world_size = read_int(environ, "LOCAL_WORLD_SIZE", default_local_size)
    assert local_world_size is not None
    num_nodes = -(-world_size // max(local_world_size, 1))
    launcher, detected_by = _name_torch_launcher(environ, argument, elastic)
    return ProcessEnvironment(
        launcher=launcher,
        detected_by=detected_by,
        rank=rank,
        local_rank=local_rank or 0,
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=read_int(environ, "GROUP_RANK", read_int(environ, "NODE_RANK", rank // max(local_world_size, 1)))
        or 0,
        num_nodes=read_int(environ, "GROUP_WORLD_SIZE", num_nodes) or num_nodes,
        master_addr=addr,
        master_port=read_int(environ, "MASTER_PORT"),
        run_id=next((environ[name] for name in _RUN_IDS if environ.get(name)), ""),
        restart_count=read_int(environ, "TORCHELASTIC_RESTART_COUNT", 0) or 0,
    )


def _name_torch_launcher(environ: Mapping[str, str], argument: int | None, elastic: bool) -> tuple[str, str]:
    if argument is not None:
        return "launch", "--local-rank on the command line"
    if elastic:
        return "torchrun", "TORCHELASTIC_RUN_ID"
    if environ.get("RAY_JOB_ID") or environ.get("RAY_RAYLET_PID"):
        return "ray", "RAY_JOB_ID" if environ.get("RAY_JOB_ID") else "RAY_RAYLET_PID"
    if environ.get("EVERYRANK_SUPERVISED"):  # everyrank's spawn driver hosts a store as torchrun does, but is not it
        return "spawn", "EVERYRANK_SUPERVISED"
    return "environment", "RANK"


def _local_rank(environ: Mapping[str, str], argument: int | None) -> int | None:
    variable = read_int(environ, "LOCAL_RANK")
    if variable is not None and argument is not None and variable != argument:
        raise environment_error(
            f"the launch environment contradicts itself: LOCAL_RANK={variable}, "
            f"but --local-rank={argument} is on the command line",
            environ,
            "do not pass --local-rank yourself: the launcher gives each process its own.",
        )
    return argument if variable is None else variable


def _parse_port(port: int | str | None, environ: Mapping[str, str]) -> int | None:
    if port is None or port == "":
        return None
    try:
        return int(port)
    except ValueError:
        raise environment_error(
            f"master_port={port!r} is not an integer", environ, "pass a port number from 1 to 65535."
        ) from None
