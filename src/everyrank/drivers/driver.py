"""The contract of a driver: plan first, purely; then carry the plan out."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from everyrank.config.schema import field, section
from everyrank.config.secrets import shown
from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.rank_files import log_file
from everyrank.diagnosis.watch_config import WatchConfig, watch_variables
from everyrank.elastic.spec import EngineRun
from everyrank.program.command import Program


@section
class DriverConfig:
    """Settings of every driver."""

    dry_run: bool = field(default=False, doc="Print the plan (every command, variable and file) and exit.")
    threads_per_rank: int = field(
        default=1, doc="`OMP_NUM_THREADS` of each rank, unless your shell sets it. torchrun sets 1; more may be faster."
    )

    @property
    def num_nodes(self) -> int:
        """Nodes of the run, the most there may be of an elastic one."""
        return 1

    @property
    def shares_folder(self) -> bool:
        """Whether other launching processes, or a job that outlives this one, use the run's folder as well."""
        return self.num_nodes > 1


C = TypeVar("C", bound=DriverConfig)


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """What is to be launched, whoever launches it.

    Attributes:
        config_file: Path of the resolved config that every worker reads.
        config_text: Its content, written before the launch.
        run_dir: The run's folder (absolute).
        cwd: Working directory of the ranks.
        env: Variables for the ranks, from ``env=...``.
        program: Somebody's own program that each rank runs, or None for an app.
        sys_path: The module search path of the ranks, for drivers that hand it on.
        device: ``distributed.device``.
        timeout_s: ``distributed.timeout_s``.
        preload: Modules that a forkserver may import before the first rank.
        watch: The ``watch`` section.
    """

    config_file: str
    config_text: str
    run_dir: str
    cwd: str
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    program: Program | None = None
    sys_path: tuple[str, ...] = ()
    device: str = "auto"
    timeout_s: float = 600.0
    preload: tuple[str, ...] = ()
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)

    @property
    def worker(self) -> tuple[str, ...]:
        """The Python module and arguments that start one worker."""
        return ("-m", "everyrank.worker", "--config", self.config_file)

    @property
    def log_dir(self) -> str:
        """Folder of the ranks' logs."""
        return f"{self.run_dir}/logs"


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """Every command, variable and file of a launch; nothing has happened yet.

    Attributes:
        driver: The driver's name.
        command: The command that is run, or to which the launch is equivalent.
        summary: Processes per node, nodes, master: one fact a line.
        env: Variables set for the ranks.
        files: Path and content of the files written before the start.
        notices: What was decided otherwise than the configuration says, and why.
        nproc_per_node: Ranks on this node; None if each node counts its own.
        num_nodes: Nodes, the most there may be of an elastic run.
        log_dir: Folder of the ranks' logs.
        num_ranks: All ranks, where that is not ``nproc_per_node`` for each node.
        engine: The engine's orders, for drivers that use it.
    """

    driver: str
    command: tuple[str, ...]
    nproc_per_node: int | None
    log_dir: str
    num_nodes: int = 1
    num_ranks: int | None = None
    summary: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notices: tuple[str, ...] = ()
    engine: EngineRun | None = None

    @property
    def world_size(self) -> int | None:
        """All ranks; None if each node counts its own."""
        if self.num_ranks is not None or self.nproc_per_node is None:
            return self.num_ranks
        return self.nproc_per_node * self.num_nodes

    @property
    def log_files(self) -> tuple[str, ...]:
        """The log of each rank; none if it is not known how many there are."""
        return tuple(log_file(self.log_dir, rank) for rank in range(self.world_size or 0))

    def render(self, with_files: bool = False) -> str:
        """The plan as text."""
        lines = [f"notice: {notice}" for notice in self.notices]
        lines += [f"driver: {self.driver}", f"command: {shlex.join(self.command)}", *self.summary]
        lines += [f"variable: {name}={shown(value)}" for name, value in sorted(self.env.items())]
        for path, content in self.files.items():
            lines.append(f"file: {path}")
            if with_files:
                lines += [f"    {line}" for line in content.splitlines()]
        return "\n".join(lines)


class Driver(ABC, Generic[C]):
    """Starts the processes of a run.

    Attributes:
        name: What ``driver=`` calls it.
        is_elsewhere: The ranks see other files than this machine has, such as those of a container's image.
        config_type: Its settings, a ``DriverConfig``.
    """

    name: str
    is_elsewhere = False
    config_type: type[C]

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Work out the launch; pure."""

    @abstractmethod
    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Carry the plan out and wait for its end."""

    def planned(self, request: LaunchRequest, command: tuple[str, ...], nproc: int | None, **more: Any) -> LaunchPlan:
        """A ``LaunchPlan`` with what every driver's has; ``more`` is the rest, with ``files`` those besides."""
        files = {request.config_file: request.config_text, **more.pop("files", {})}
        env = more.pop("env") if "env" in more else rank_variables(request, self.config.threads_per_rank)
        common: dict[str, Any] = {"driver": self.name, "log_dir": request.log_dir, "num_nodes": self.config.num_nodes}
        return LaunchPlan(command=command, nproc_per_node=nproc, files=files, env=env, **common, **more)


def python_path(request: LaunchRequest) -> dict[str, str]:
    """``PYTHONPATH`` for a launcher that starts fresh interpreters: the apps of this process are found there, too.

    The folders that the ranks' own variables name come first. A program finds its modules as it does by itself.
    """
    if request.program is not None:
        return {}
    folders = [*request.env.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in folders if path))}


def rank_variables(request: LaunchRequest, threads_per_rank: int) -> dict[str, str]:
    """Variables for every rank: those of ``env=...``, what lets it report, and the number of threads unless the shell
    sets it.

    Args:
        request: The launch.
        threads_per_rank: ``OMP_NUM_THREADS``; 0 leaves it alone.
    """
    watched = watch_variables(request.run_dir, request.watch.enabled, {**os.environ, **request.env})
    variables = {**request.env, **watched}
    if threads_per_rank and "OMP_NUM_THREADS" not in os.environ:
        variables.setdefault("OMP_NUM_THREADS", str(threads_per_rank))
    return variables
