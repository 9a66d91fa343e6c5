"""Real ranks for the tests of the runtime, started in milliseconds from one import of torch."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import pytest

from everyrank.elastic import engine_pool

_PRELOAD = ["torch", "everyrank.runtime.collectives", "everyrank.runtime.preemption", "everyrank.runtime.process_group"]


@dataclass
class Rank:
    """How one rank ended: what its function returned, or the type and text of its exception, and when."""

    value: Any = None
    error: str | None = None
    message: str = ""
    exit_code: int | None = None
    seconds: float = 0.0


class _ByValue:
    """A function that is sent whole, since a child cannot import a test module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        module = sys.modules[function.__module__]
        # Whoever names torch.tensor and torch.distributed is taken for one that needs this module of their names.
        tensor = sys.modules.pop("torch.distributed.tensor", None)
        cloudpickle.register_pickle_by_value(module)
        try:
            self.pickled = cloudpickle.dumps(function)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
            if tensor is not None:
                sys.modules["torch.distributed.tensor"] = tensor

    def __reduce__(self) -> Any:
        return cloudpickle.loads, (self.pickled,)


@dataclass
class Ranks:
    """Processes of one test, still running."""

    processes: list[Any] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    def finish(self, timeout_s: float = 60.0) -> list[Rank]:
        """Wait for all ranks; one that still runs after ``timeout_s`` is killed and fails the test."""
        deadline, ranks = time.monotonic() + timeout_s, []
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            try:
                rank = Rank(**pipe.recv()) if pipe.poll(max(deadline - time.monotonic(), 0)) else Rank(error="Stuck")
            except EOFError:
                rank = Rank(error="Died")
            process.join(max(deadline - time.monotonic(), 0.1))
            if process.exitcode is None:
                process.kill()
                process.join()
                rank.error = "Stuck"
            rank.exit_code = process.exitcode
            pipe.close()
            ranks.append(rank)
        return ranks


def _child(function: Callable[..., Any], pipe: Connection, rank: int, args: tuple[Any, ...]) -> None:
    started = time.monotonic()
    try:
        result = {"value": function(rank, *args)}
    except BaseException as error:
        result = {"error": type(error).__name__, "message": str(error)}
    pipe.send(result | {"seconds": time.monotonic() - started})
    pipe.close()


@pytest.fixture(scope="session", autouse=True)
def _forkserver(_scratch: Any) -> Iterator[None]:
    """One server with torch imported for the whole session; it is there before any test looks for leftovers."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    multiprocessing.forkserver.ensure_running()
    yield
    engine_pool.shutdown()  # one that was forked meanwhile holds the server's descriptor, and the server would not end
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., Ranks]]:
    """Start ``function(rank, *args)`` in one process for each rank; what still runs at the end is killed."""
    started: list[Ranks] = []
    context = multiprocessing.get_context("forkserver")

    def start(function: Callable[..., Any], ranks: int | list[int], *args: Any) -> Ranks:
        group = Ranks()
        started.append(group)
        for rank in range(ranks) if isinstance(ranks, int) else ranks:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_ByValue(_child), args=(_ByValue(function), theirs, rank, args))
            process.start()
            theirs.close()
            group.processes.append(process)
            group.pipes.append(ours)
        return group

    yield start
    for group in started:
        for process in group.processes:
            if process.is_alive():
                process.kill()
            process.join()


@pytest.fixture
def run_ranks(start_ranks: Callable[..., Ranks]) -> Callable[..., list[Rank]]:
    """Run ``function(rank, *args)`` on each rank to the end."""

    def run(function: Callable[..., Any], ranks: int | list[int], *args: Any, timeout_s: float = 60.0) -> list[Rank]:
        return start_ranks(function, ranks, *args).finish(timeout_s)

    return run
