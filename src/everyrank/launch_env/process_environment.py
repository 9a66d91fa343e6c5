"""What a process is told about itself by whatever started it, and how a mistake in that is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from everyrank.errors import LaunchEnvironmentError

# Every variable by which a launcher tells a process who it is, in the order a report lists them.
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_RANK", "MPI_LOCAL", "EVERYRANK_")
# Set for ranks that one of our launchers watches: it, not the rank, then says how the rank ended.
SUPERVISED = "EVERYRANK_SUPERVISED"
_MOST_LISTED = 24  # a Slurm step sets some sixty variables: a wall of text hides the one that matters


@dataclass(frozen=True, kw_only=True)
class ProcessEnvironment:
    """One process's place in a run, as its launcher gave it.

    Attributes:
        launcher: Who started the process: ``python``, ``spawn`` (explicit arguments), ``torchrun``, ``launch``
            (``torch.distributed.launch`` without ``--use-env``), ``ray``, ``slurm``, ``openmpi``, ``pmi`` or
            ``environment`` (RANK and WORLD_SIZE set by somebody else, as Kubernetes operators do).
        detected_by: The variable, command-line option or argument that told.
        rank: Index of this process among all, 0 <= rank < world_size.
        local_rank: Index of this process among those of its node; it picks the device.
        world_size: Number of processes of the run.
        local_world_size: Number of processes on this node.
        node_rank: Index of this node among the run's nodes.
        num_nodes: Number of nodes.
        master_addr: Host where the processes meet, or None if nobody said.
        master_port: TCP port where the processes meet, or None if nobody said.
        run_id: The launcher's name for the run (job id), or an empty string.
        restart_count: How many times the launcher has restarted the run.
    """

    launcher: str = "python"
    detected_by: str = "no launcher variable"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    run_id: str = ""
    restart_count: int = 0


def describe_variables(environ: Mapping[str, str]) -> str:
    """Return the launcher variables that are set, as ``NAME=value`` joined by commas."""
    names = [name for name in _LAUNCHER_VARIABLES if name in environ]
    names += sorted(name for name in environ if name.startswith(_LAUNCHER_PREFIXES))
    shown = ", ".join(f"{name}={environ[name]}" for name in names[:_MOST_LISTED])
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (shown + more) or "none"


def environment_error(problem: str, environ: Mapping[str, str], mend: str) -> LaunchEnvironmentError:
    """Return the error for a half-set or contradictory launch environment.

    Args:
        problem: What is wrong, as a sentence without its full stop.
        environ: The variables of the process; those of launchers are listed in the message.
        mend: What the user can do, as a sentence.
    """
    return LaunchEnvironmentError(f"{problem}.\nSet: {describe_variables(environ)}.\nFix: {mend}")


def read_int(environ: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    """Return the integer in variable ``name``, or ``default`` where it is not set or empty.

    Raises:
        LaunchEnvironmentError: The value is no integer.
    """
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise environment_error(
            f"{name}={text!r} is not an integer",
            environ,
            f"set {name} to a whole number, or unset it if this process was not started by a launcher.",
        ) from None


def require_int(environ: Mapping[str, str], name: str, because: str) -> int:
    """Return the integer in variable ``name``, which must be set.

    Args:
        environ: The variables of the process.
        name: The variable.
        because: Which variable makes this one necessary.

    Raises:
        LaunchEnvironmentError: The variable is missing or no integer.
    """
    value = read_int(environ, name)
    if value is None:
        raise environment_error(
            f"the launch environment is half-set: {because} is set, {name} is missing",
            environ,
            f"start the program with a launcher that sets both (for example torchrun), set {name}, or unset {because}.",
        )
    return value


def check(environment: ProcessEnvironment, environ: Mapping[str, str]) -> ProcessEnvironment:
    """Return ``environment`` if its numbers agree with each other.

    Raises:
        LaunchEnvironmentError: They do not; the message lists what is set.
    """
    e = environment
    problems: Sequence[tuple[bool, str]] = (
        (e.world_size < 1, f"the world size is {e.world_size}, but a run has at least 1 process"),
        (not 0 <= e.rank < max(e.world_size, 1), f"rank {e.rank} is not in 0..{e.world_size - 1} (world size)"),
        (e.local_world_size < 1, f"the local world size is {e.local_world_size}, but it is at least 1"),
        (
            e.local_world_size > e.world_size,
            f"the local world size {e.local_world_size} is greater than the world size {e.world_size}",
        ),
        (
            not 0 <= e.local_rank < max(e.local_world_size, 1),
            f"local rank {e.local_rank} is not in 0..{e.local_world_size - 1} (local world size)",
        ),
        (
            e.master_port is not None and not 0 < e.master_port < 65536,
            f"master port {e.master_port} is not in 1..65535",
        ),
    )
    for wrong, problem in problems:
        if wrong:
            raise environment_error(
                f"the launch environment contradicts itself: {problem} (launcher {e.launcher}, by {e.detected_by})",
                environ,
                "let one launcher set all of these variables, or unset those left over from another run.",
            )
    return e
