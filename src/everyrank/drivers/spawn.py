"""``driver=spawn``: ``torch.multiprocessing``, for local development."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from everyrank.config.schema import field, section
from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.diagnosis.proc import catches
from everyrank.diagnosis.rank_files import clear_errors, error_file, existing, log_file, read_error
from everyrank.drivers.driver import Driver, DriverConfig, LaunchPlan, LaunchRequest
from everyrank.elastic.entry import call_entry
from everyrank.elastic.lifetime import die_with_parent
from everyrank.elastic.machine import resolve_nproc
from everyrank.elastic.process.sweep import MARK
from everyrank.elastic.process.sweeping import new_mark, swept
from everyrank.elastic.signals import forwarded
from everyrank.errors import EXIT_OK, EXIT_PREEMPTED
from everyrank.launch_env.process_environment import SUPERVISED
from everyrank.rendezvous.ports import check_port_is_free
from everyrank.runtime import no_terminal

_GRACE_S = 1.0
_SHUTDOWN_S = 30.0


@section
class SpawnConfig(DriverConfig):
    """``driver=spawn``: ``torch.multiprocessing``."""

    nproc_per_node: int | str = field(default=2, doc="Number of processes, or `auto`, `gpu`, `cpu`.")
    master_port: int | None = field(default=None, doc="A port for the store; null finds a free one.")


class SpawnDriver(Driver[SpawnConfig]):
    """Fresh interpreters started by ``torch.multiprocessing``, as in PyTorch's tutorials."""

    name = "spawn"
    config_type = SpawnConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan the processes and their variables."""
        nproc = resolve_nproc(self.config.nproc_per_node, "driver.nproc_per_node", request.device)
        port = self.config.master_port
        return self.planned(
            request,
            ("python", *request.worker),
            nproc,
            summary=(
                f"processes: {nproc}, each a fresh interpreter (torch.multiprocessing)",
                f"master: 127.0.0.1:{port}" if port else "master: 127.0.0.1, any free port",
            ),
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Start the processes and wait for them."""
        if self.config.master_port:
            check_port_is_free(self.config.master_port)
        import torch.multiprocessing as mp

        from everyrank.rendezvous.loopback import LoopbackRendezvous

        world_size = plan.world_size
        assert world_size is not None
        rendezvous = LoopbackRendezvous("spawn", self.config.master_port or 0)
        store = rendezvous.next_rendezvous().bootstrap_store_info
        assert store is not None
        shared = {
            **plan.env,
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": store.master_addr,
            "MASTER_PORT": str(store.master_port),
            # This process holds the store; the ranks connect to it and listen on nothing.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            SUPERVISED: "1",
            **new_mark(),
        }
        clear_errors(request.log_dir)
        processes: list[Any] = []

        def send(signum: int) -> None:
            for process in processes:
                if process.is_alive() and (signum != signal.SIGQUIT or catches(process.pid, signum)):
                    os.kill(process.pid, signum)

        try:
            with swept(shared[MARK]) as sweep_sessions, forwarded(send, lambda: send(signal.SIGKILL)) as told:
                context = mp.start_processes(
                    _spawned_rank,
                    args=(request.config_file, request.sys_path, request.log_dir, shared, os.getpid()),
                    nprocs=world_size,
                    join=False,
                    start_method="spawn",
                )
                processes += context.processes
                sweep_sessions([process.pid for process in processes])
                ended_by_us = _wait(processes, told)
        finally:
            rendezvous.shutdown()
        failures = tuple(
            RankFailure(
                rank=rank,
                exit_code=process.exitcode,
                error=read_error(error_file(request.log_dir, rank)),
                log_file=existing(log_file(request.log_dir, rank)),
                ended_by_us=rank in ended_by_us,
            )
            for rank, process in enumerate(processes)
            if process.exitcode
        )
        return Outcome(failures=failures, signum=told.signum, world_size=world_size)


def _wait(processes: list[Any], told: Any) -> set[int]:
    """Wait for all processes; after a failure, or a signal, give the others a grace and end them."""
    from multiprocessing.connection import wait

    ended_by_us: set[int] = set()
    deadline = float("inf")
    while alive := [p for p in processes if p.exitcode is None]:
        wait([p.sentinel for p in alive], timeout=0.1)
        codes = [p.exitcode for p in processes]
        now_s = time.monotonic()
        if told.signum is not None:
            deadline = min(deadline, now_s + _SHUTDOWN_S)
        elif any(code not in (None, EXIT_OK, EXIT_PREEMPTED) for code in codes):
            deadline = min(deadline, now_s + _GRACE_S)
        if now_s >= deadline:
            for rank, process in enumerate(processes):
                if process.exitcode is None:
                    ended_by_us.add(rank)
                    process.kill() if told.signum is not None else process.terminate()
                    process.join(_GRACE_S)
                    process.kill()
                    process.join()
    return ended_by_us


def _spawned_rank(
    rank: int,
    config_file: str,
    sys_path: tuple[str, ...],
    log_dir: str,
    shared: dict[str, str],
    parent_pid: int,
) -> None:
    die_with_parent(parent_pid)
    os.setsid()  # Ctrl-C in the terminal goes to the launching process, which passes it on once
    no_terminal.detach()
    os.environ.update(shared)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_ERROR_FILE=error_file(log_dir, rank))
    sys.path[:] = sys_path
    call_entry("everyrank.worker:run_rank", (config_file,))
