"""What the engine is asked to run, and what came of it. Plain data: no torch here."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everyrank.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED


@dataclass(frozen=True, kw_only=True)
class RankFunction:
    """A function that every rank calls: ``package.module:function`` and its arguments."""

    entry: str
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RankCommand:
    """An outside program that every rank executes."""

    argv: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """How the nodes of a run find each other.

    Attributes:
        backend: ``loopback`` (this machine only), ``static``, ``c10d`` or another of torch's backends.
        endpoint: ``host:port``; empty for ``loopback``.
        run_id: The id that the nodes of a run share.
        node_rank: This node's rank, for ``static``.
        config: Further settings of the backend.
    """

    backend: str = "loopback"
    endpoint: str = ""
    run_id: str = "everyrank"
    node_rank: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineRun:
    """One launch on one node.

    Attributes:
        work: What each rank runs.
        nproc_per_node: Ranks on this node.
        min_nodes: Nodes to start with.
        max_nodes: Nodes to grow to.
        rendezvous: How nodes find each other.
        master_port: The port that was asked for on one machine; 0 for any.
        max_restarts: How often a failed group is started again.
        monitor_interval_s: Seconds between two looks at the ranks.
        start_method: ``forkserver``, ``spawn`` or ``fork``.
        log_dir: Folder for the ranks' logs and error files.
        env: Variables set for every rank.
        shutdown_timeout_s: Seconds the ranks have after a signal before SIGKILL.
        failure_grace_s: Seconds the other ranks have to end by themselves after one failed.
        preload: Modules that the forkserver imports before the first rank.
    """

    work: RankFunction | RankCommand
    nproc_per_node: int
    log_dir: str
    cwd: str
    sys_path: tuple[str, ...] = ()
    base_env: Mapping[str, str] = field(default_factory=dict)
    min_nodes: int = 1
    max_nodes: int = 1
    rendezvous: Rendezvous = field(default_factory=Rendezvous)
    master_port: int = 0
    max_restarts: int = 0
    monitor_interval_s: float = 0.05
    start_method: str = "forkserver"
    env: Mapping[str, str] = field(default_factory=dict)
    shutdown_timeout_s: float = 30.0
    failure_grace_s: float = 1.0
    preload: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """How one rank ended, when it did not end well.

    Attributes:
        rank: Its global rank.
        exit_code: Negative for a signal.
        error: The rank's own record of its exception (see ``failures.py``), or None.
        log_file: Its log.
        ended_by_us: The engine sent the signal that ended it, after another rank had failed.
    """

    rank: int
    exit_code: int
    error: Mapping[str, Any] | None = None
    log_file: str | None = None
    ended_by_us: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run on this node.

    Attributes:
        failures: The ranks of the last attempt that did not end well.
        signum: The signal that ended the run, or None.
        message: An error of the engine itself, such as a rendezvous that timed out.
        user_error: ``message`` is something the user can mend.
        num_restarts: How often the group was started again.
    """

    failures: tuple[RankFailure, ...] = ()
    signum: int | None = None
    message: str = ""
    user_error: bool = False
    num_restarts: int = 0
    world_size: int = 0

    @property
    def exit_code(self) -> int:
        """The exit code of the launching process."""
        codes = {f.exit_code for f in self.failures if not f.ended_by_us}
        if EXIT_PREEMPTED in codes and codes <= {EXIT_PREEMPTED, EXIT_OK}:
            return EXIT_PREEMPTED
        if self.signum is not None:
            return EXIT_INTERRUPTED if self.signum == signal.SIGINT else 128 + self.signum
        if self.message:
            return EXIT_BAD_INPUT if self.user_error else EXIT_FAILURE
        if codes == {EXIT_BAD_INPUT}:
            return EXIT_BAD_INPUT
        return EXIT_FAILURE if self.failures else EXIT_OK
