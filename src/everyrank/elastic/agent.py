"""torch's elastic agent with ranks from our forkserver, and without the faults that hurt our users.

Source of the behaviour: ``torch/distributed/elastic/agent/server`` and ``multiprocessing/api.py`` of torch 2.13.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, PContext, RunProcsResult, Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from everyrank.diagnosis.judge import conclude
from everyrank.diagnosis.outcome import RankFailure
from everyrank.diagnosis.rank_files import error_file, existing, log_file, read_error
from everyrank.diagnosis.telling import tell_restart
from everyrank.elastic.forkserver import Forkserver, RankProcess
from everyrank.elastic.process.sweep import sweep
from everyrank.elastic.spec import EngineRun
from everyrank.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, ProcessGroupError

SETTLE_S = 7.0  # a node that went away has been noticed by then (see rendezvous/elastic.py)


class RunLogs(LogsSpecs):
    """Error files in the run's own log folder.

    torch's default makes a ``torchelastic_*`` folder in the temporary folder for every launch and leaves it there.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir, tee=Std.NONE)

    @property
    def root_log_dir(self) -> str:
        """The run's log folder."""
        return str(self._root_log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Name the files of each local rank, and clear the error files of an earlier attempt."""
        os.makedirs(self.root_log_dir, exist_ok=True)
        errors = {}
        for local_rank, env in envs.items():
            errors[local_rank] = error_file(self.root_log_dir, int(env["RANK"]))
            if os.path.exists(errors[local_rank]):
                os.remove(errors[local_rank])
            env["TORCHELASTIC_ERROR_FILE"] = errors[local_rank]
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere, stderrs=nowhere, tee_stdouts={}, tee_stderrs={}, error_files=errors)


class ForkedRanks(PContext):
    """The ranks of this node, forked by the forkserver."""

    def __init__(self, run: EngineRun, forkserver: Forkserver, stdio: tuple[int, int], **context: Any) -> None:
        super().__init__(**context)
        self._run = run
        self._forkserver = forkserver
        self._stdio = stdio
        self._pids: dict[int, int] = {}
        self._first_failure_s: float | None = None
        self.ended_by_us: set[int] = set()

    def _start(self) -> None:
        for local_rank in range(self.nprocs):
            process = RankProcess(
                entry=self._run.entry,
                args=self.args[local_rank],
                env={**self._run.base_env, **self._run.env, **self.envs[local_rank]},
                cwd=self._run.cwd,
                sys_path=list(self._run.sys_path),
                surroundings=self._run.surroundings,
            )
            self._pids[local_rank] = self._forkserver.fork(process, *self._stdio)

    def exit_codes(self) -> dict[int, int]:
        """Exit codes of the local ranks that have ended."""
        codes = self._forkserver.exit_codes
        return {local_rank: codes[pid] for local_rank, pid in self._pids.items() if pid in codes}

    def wait(self, timeout: float = -1, period: float = 1) -> RunProcsResult | None:
        """Wait until the ranks have ended or one has failed, at most ``timeout`` seconds (negative: for ever)."""
        deadline = time.monotonic() + timeout
        while True:
            result = self._poll()
            left_s = period if timeout < 0 else min(period, deadline - time.monotonic())
            if result is not None or left_s <= 0:
                return result
            self._forkserver.wait(left_s)

    def _poll(self) -> RunProcsResult | None:
        self._forkserver.wait(0)
        codes = self.exit_codes()
        failed = {r for r, code in codes.items() if code != EXIT_OK}
        if len(codes) < self.nprocs:
            if not {codes[r] for r in failed} - {EXIT_PREEMPTED}:
                return None  # running, or leaving together after a preemption
            # The first to exit is often an innocent rank whose peer went away: give the guilty one time to say so.
            if self._first_failure_s is None:
                self._first_failure_s = time.monotonic()
            if time.monotonic() - self._first_failure_s < self._run.failure_grace_s:
                return None
            self.close(timeout=int(self._run.failure_grace_s) + 1)
            codes = self.exit_codes()
            failed = {r for r, code in codes.items() if code != EXIT_OK}
        if not failed:
            return RunProcsResult(return_values=dict.fromkeys(range(self.nprocs)))
        failures = {
            r: ProcessFailure(local_rank=r, pid=self._pids[r], exitcode=codes[r], error_file=self.error_files[r])
            for r in failed
        }
        return RunProcsResult(failures=failures)

    def pids(self) -> dict[int, int]:
        """Pids by local rank."""
        return dict(self._pids)

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        for signum, patience_s in ((death_sig, timeout), (signal.SIGKILL, 30)):
            alive = set(self._pids) - set(self.exit_codes())
            for local_rank in alive:
                self.ended_by_us.add(local_rank)
                self._forkserver.kill(self._pids[local_rank], signum)
            deadline = time.monotonic() + patience_s
            while len(self.exit_codes()) < len(self._pids) and time.monotonic() < deadline:
                self._forkserver.wait(max(0.0, deadline - time.monotonic()))


class RankAgent(LocalElasticAgent):
    """An elastic agent that knows the exit codes of everyrank."""

    def __init__(
        self,
        run: EngineRun,
        spec: WorkerSpec,
        make_ranks: Callable[..., ForkedRanks] | None,
        take_signals: Callable[[], None],
        sweep_sessions: Callable[[Iterable[int]], None],
    ) -> None:
        super().__init__(
            spec=spec,
            logs_specs=RunLogs(run.log_dir),
            start_method=run.start_method,
            shutdown_timeout=int(run.shutdown_timeout_s),
            exit_barrier_timeout=60,
        )
        self._run = run
        self._make_ranks = make_ranks
        self._take_signals = take_signals
        self._sweep_sessions = sweep_sessions
        self._sessions: set[int] = set()

    @property
    def ranks(self) -> PContext | None:
        """The processes of the current attempt."""
        return self._pcontext

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self._make_ranks is None:
            sweep(sessions=self._sessions)  # what the ranks of an earlier attempt have left
            pids = super()._start_workers(worker_group)
            self._sessions = set(pids.values())
            self._sweep_sessions(self._sessions)
            self._take_signals()  # torch has just put its own handlers there
            return pids
        spec = worker_group.spec
        envs = {worker.local_rank: self._rank_env(worker_group, worker) for worker in worker_group.workers}
        self._pcontext = self._make_ranks(
            name=spec.role,
            entrypoint=spec.get_entrypoint_name(),
            args=dict.fromkeys(envs, tuple(spec.args)),
            envs=envs,
            logs_specs=self._logs_specs,
        )
        self._pcontext.start()
        self._take_signals()  # torch has just put its own handlers there
        return self._pcontext.pids()

    def _rank_env(self, group: WorkerGroup, worker: Any) -> dict[str, str]:
        """The variables torchrun sets for a worker (its documented contract with user scripts)."""
        spec = group.spec
        return {
            "LOCAL_RANK": str(worker.local_rank),
            "RANK": str(worker.global_rank),
            "GROUP_RANK": str(group.group_rank),
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "WORLD_SIZE": str(worker.world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self._attempt()),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }

    def _attempt(self) -> int:
        """How many attempts were made before: agreed by all nodes, where there are several."""
        spec = self._worker_group.spec
        return getattr(spec.rdzv_handler, "attempt", spec.max_restarts - self._remaining_restarts)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        rendezvous = worker_group.spec.rdzv_handler
        if hasattr(rendezvous, "check_contact"):
            try:
                rendezvous.check_contact()
            except ProcessGroupError:
                self._shutdown_timeout = self._short_patience_s  # the other nodes may go on without this one already
                raise
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {failure.exitcode for failure in result.failures.values()}
            if EXIT_BAD_INPUT not in codes and self._others_came_or_went(codes):
                return RunResult(state=WorkerState.HEALTHY)  # the agent then starts the ranks anew, uncounted
            # Starting again mends neither a preemption (the machine is going) nor a mistake in the configuration.
            if codes & {EXIT_PREEMPTED, EXIT_BAD_INPUT}:
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                self._tell_restart()
        return result

    def _others_came_or_went(self, codes: set[int]) -> bool:
        """Whether the ranks of this node ended because the set of nodes is changing, not on their own account.

        Then they lost a peer, were aborted by NCCL's watchdog, or left with a checkpoint because a rank elsewhere was
        told to.
        """
        rendezvous = self._worker_group.spec.rdzv_handler
        if not hasattr(rendezvous, "changed") or self._worker_group.group_world_size == 1:
            return False
        elastic = self._run.min_nodes != self._run.max_nodes
        if not elastic and not self._run.max_restarts:
            return False
        errors = [read_error(error_file(self._run.log_dir, w.global_rank)) for w in self._worker_group.workers]
        own = [error for error in errors if error and not error.get("lost_peer")]
        if own or not codes <= {EXIT_PREEMPTED, EXIT_FAILURE, -signal.SIGABRT, -signal.SIGTERM}:
            return False
        try:
            return rendezvous.changed(SETTLE_S)
        except ProcessGroupError:
            if codes <= {EXIT_PREEMPTED}:
                return False  # the node that served the store has left, with a checkpoint, and so do we
            raise

    def failures(self) -> tuple[RankFailure, ...]:
        """The ranks of this node, of the current attempt, that did not end well."""
        codes = _exit_codes(self._pcontext) if self._pcontext else {}
        ended_by_us: set[int] = getattr(self._pcontext, "ended_by_us", set())
        return tuple(
            RankFailure(
                rank=worker.global_rank,
                exit_code=codes[worker.local_rank],
                error=read_error(error_file(self._run.log_dir, worker.global_rank)),
                log_file=existing(log_file(self._run.log_dir, worker.global_rank)),
                ended_by_us=worker.local_rank in ended_by_us and codes[worker.local_rank] < 0,
            )
            for worker in self._worker_group.workers
            if codes.get(worker.local_rank, 0) != 0
        )

    def _tell_restart(self) -> None:
        group, attempt = self._worker_group, self._attempt()
        verdict = conclude(self._run.run_dir, self.failures(), world_size=group.workers[0].world_size, attempt=attempt)
        tell_restart(verdict, attempt)

    @property
    def _short_patience_s(self) -> int:
        return int(self._run.failure_grace_s) + 1

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # Ranks that wait for a dead peer have nothing to save: the checkpoint on disk is what a restart goes on from.
        # If nodes only come in, all ranks are well and can save first.
        well = worker_group.state == WorkerState.HEALTHY and not getattr(worker_group.spec.rdzv_handler, "num_gone", 0)
        self._shutdown(timeout=int(self._run.shutdown_timeout_s) if well else self._short_patience_s)


def _exit_codes(ranks: PContext) -> dict[int, int]:
    if isinstance(ranks, ForkedRanks):
        return ranks.exit_codes()
    started = getattr(ranks, "_pc", None)  # torch keeps spawned ranks here ...
    if started is not None:
        return {i: p.exitcode for i, p in enumerate(started.processes) if p.exitcode is not None}
    handlers = getattr(ranks, "subprocess_handlers", {})  # ... and outside programs here
    return {i: h.proc.returncode for i, h in handlers.items() if h.proc.returncode is not None}
