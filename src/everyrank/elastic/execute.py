"""Carrying out one launch on this node with torch's elastic agent."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.proc import catches
from everyrank.elastic.agent import ForkedRanks, RankAgent
from everyrank.elastic.entry import call_entry
from everyrank.elastic.forkserver import Forkserver
from everyrank.elastic.lifetime import die_with_parent
from everyrank.elastic.process.surroundings import Surroundings
from everyrank.elastic.process.sweep import MARK
from everyrank.elastic.process.sweeping import swept
from everyrank.elastic.spec import EngineRun
from everyrank.errors import ProcessGroupError, UserError
from everyrank.rendezvous.elastic import ElasticRendezvous
from everyrank.rendezvous.loopback import LoopbackRendezvous
from everyrank.rendezvous.ports import split_endpoint
from everyrank.rendezvous.static import StaticRendezvous

_HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2"


def execute(run: EngineRun, forkserver: Forkserver, stdio: tuple[int, int]) -> Outcome:
    """Run the ranks of this node to their end.

    Args:
        run: What to run and how.
        forkserver: Where ranks come from with ``start_method=forkserver``.
        stdio: Descriptors for the ranks' stdout and stderr.
    """
    with swept(run.env.get(MARK, "")) as sweep_sessions:
        return _execute(run, forkserver, stdio, sweep_sessions)


def _execute(
    run: EngineRun,
    forkserver: Forkserver,
    stdio: tuple[int, int],
    sweep_sessions: Callable[[Iterable[int]], None],
) -> Outcome:
    _enter_environment(run, stdio)
    handler = _rendezvous(run)
    make_ranks = None
    args: tuple[Any, ...] = (run.entry, run.args, run.surroundings)
    if run.start_method == "forkserver":
        args = run.args
        make_ranks = functools.partial(ForkedRanks, run, forkserver, stdio)
    spec = WorkerSpec(
        role=run.role,
        local_world_size=run.nproc_per_node,
        entrypoint=_start,
        args=args,
        rdzv_handler=handler,
        max_restarts=run.max_restarts,
        monitor_interval=run.monitor_interval_s,
    )
    take_signals = _once()
    agent = RankAgent(run, spec, make_ranks, take_signals, sweep_sessions)
    signum: int | None = None
    message = ""
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = _HANDLED  # torch handles them once ranks run; we, until then
    try:
        take_signals()
        signal.signal(signal.SIGQUIT, functools.partial(_show_stacks, agent))
        agent.run()
    except SignalException as error:
        signum = int(error.sigval)
        getattr(handler, "leave", handler.shutdown)()  # the other nodes may go on
    except ProcessGroupError as error:
        if isinstance(error, UserError):
            raise
        message = f"error: {error}"
    finally:
        if signum is None:
            handler.shutdown()
        for name in (*_HANDLED.split(","), "SIGQUIT"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    return _outcome(run, agent, signum, message)


def _once() -> Callable[[], None]:
    """Return a function that installs handlers, which raise SignalException for the first signal only.

    A scheduler sends the same signal to every process of a step, and the launching process passes it on once more: the
    second must not break off what the first began. To end everything at once, the launching process is told twice.
    """
    told: list[int] = []

    def handle(signum: int, _frame: Any) -> None:
        if not told:
            told.append(signum)
            name = signal.Signals(signum).name
            raise SignalException(f"the engine was told to stop by {name}", sigval=signal.Signals(signum))

    def install() -> None:
        for name in _HANDLED.split(","):
            signal.signal(getattr(signal, name), handle)

    return install


def _enter_environment(run: EngineRun, stdio: tuple[int, int]) -> None:
    """Spawned ranks and outside programs inherit folder, variables and output from this process."""
    os.chdir(run.cwd)
    os.environ.clear()
    os.environ.update({**run.base_env, **run.env})
    sys.path[:] = list(run.sys_path) or sys.path
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(stdio[fd - 1], fd)


def _rendezvous(run: EngineRun) -> RendezvousHandler:
    rendezvous = run.rendezvous
    if rendezvous.backend == "loopback":
        return LoopbackRendezvous(rendezvous.run_id or run.env.get(MARK, "everyrank"), run.master_port)
    config = dict(rendezvous.config)
    if rendezvous.backend in ("static", "c10d"):
        host, port = split_endpoint(rendezvous.endpoint, "driver.rdzv_endpoint")
        timeout_s = float(config["timeout_s"])
        if rendezvous.backend == "static":
            return StaticRendezvous(host, port, rendezvous.node_rank, run.max_nodes, rendezvous.run_id, timeout_s)
        return ElasticRendezvous(
            host, port, rendezvous.run_id, run.min_nodes, run.max_nodes, timeout_s, float(config["last_call_s"])
        )
    return get_rendezvous_handler(
        RendezvousParameters(
            backend=rendezvous.backend,
            endpoint=rendezvous.endpoint,
            run_id=rendezvous.run_id,
            min_nodes=run.min_nodes,
            max_nodes=run.max_nodes,
            **config,
        )
    )


def _show_stacks(agent: RankAgent, signum: int, _frame: Any) -> None:
    """Have every rank print its stacks and go on."""
    for pid in agent.ranks.pids().values() if agent.ranks else ():
        if catches(pid, signum):
            os.kill(pid, signum)


def _start(entry: str, args: tuple[Any, ...], surroundings: Surroundings | None) -> None:
    """Entry of a rank that torch starts by spawn or fork."""
    die_with_parent()
    if os.getsid(0) != os.getpid():
        os.setsid()  # its children can be told from others'
    if surroundings is not None:
        surroundings.enter()
    call_entry(entry, args)


def _outcome(run: EngineRun, agent: RankAgent, signum: int | None, message: str) -> Outcome:
    group = agent.get_worker_group()
    failures = agent.failures()
    if message:  # the ranks that only lost a peer, or were ended, ended because of it
        own = (f for f in failures if not f.ended_by_us and not (f.error and f.error.get("lost_peer")))
        failures = tuple(own)
    return Outcome(
        failures=failures,
        signum=signum,
        message=message,
        num_restarts=run.max_restarts - agent._remaining_restarts,
        world_size=group.workers[0].world_size if group.workers else 0,
    )
