"""What the engine is asked to run. Plain data: no torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everyrank.elastic.process.surroundings import Surroundings


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """How the nodes of a run find each other.

    Attributes:
        backend: ``loopback`` (this machine only), ``static``, ``c10d`` or another of torch's backends.
        endpoint: ``host:port``; empty for ``loopback``.
        run_id: The id that the nodes of a run share; empty for ``loopback``: one of the launch's own.
        node_rank: This node's rank, for ``static``.
        config: Further settings of the backend.
    """

    backend: str = "loopback"
    endpoint: str = ""
    run_id: str = ""
    node_rank: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineRun:
    """One launch on one node.

    Attributes:
        entry: The function that every rank calls, ``package.module:function``.
        args: Its arguments.
        nproc_per_node: Ranks on this node.
        role: What torchelastic calls the ranks (``ROLE_NAME``).
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
        surroundings: What the ranks inherit from the launching process besides environment and folder.
    """

    entry: str
    args: tuple[Any, ...]
    nproc_per_node: int
    log_dir: str
    cwd: str
    role: str = "default"
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
    surroundings: Surroundings | None = None

    @property
    def run_dir(self) -> str:
        """The run's folder: where the verdict is written."""
        return os.path.dirname(self.log_dir)
