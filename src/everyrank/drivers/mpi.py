"""``driver=mpi``: Open MPI's mpirun starts the ranks; they find each other by its variables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

from everyrank.config.schema import field, section
from everyrank.diagnosis.launcher_words import exit_codes
from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.diagnosis.rank_files import clear_errors
from everyrank.drivers.cluster import MPI, LastWords, check_hosts, recorded_failures
from everyrank.drivers.driver import Driver, DriverConfig, LaunchPlan, LaunchRequest, python_path, rank_variables
from everyrank.elastic.guarded import guarded
from everyrank.elastic.machine import resolve_nproc
from everyrank.elastic.process.sweep import MARK
from everyrank.elastic.process.sweeping import new_mark, swept
from everyrank.elastic.signals import forwarded, signals_to
from everyrank.errors import EXIT_PREEMPTED, DriverError


@section
class MpiConfig(DriverConfig):
    """``driver=mpi``: Open MPI's mpirun."""

    nproc_per_node: int | str = field(default=2, doc="Ranks on each node, or auto, gpu, cpu.")
    hosts: list[str] = field(factory=list, doc="Hosts, each with nproc_per_node ranks; empty: this machine.")
    hostfile: str | None = field(default=None, doc="A hostfile of mpirun's instead of hosts.")
    num_ranks: int | None = field(default=None, ge=1, doc="All ranks, with a hostfile.")
    mpirun: str = field(default="mpirun", doc="The program.")
    mpi_args: list[str] = field(factory=list, doc="Further options of mpirun, as they are.")

    @property
    def num_nodes(self) -> int:
        """Hosts that are named here; what a hostfile says is mpirun's to know."""
        return max(len(self.hosts), 1)

    @property
    def shares_folder(self) -> bool:
        """One mpirun, started here, is all that uses the folder."""
        return False


class MpiDriver(Driver[MpiConfig]):
    """Runs mpirun as a child and reads what its ranks recorded."""

    name = "mpi"
    config_type = MpiConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan the one command."""
        c = self.config
        if c.hosts and c.hostfile:
            raise DriverError("driver.hosts and driver.hostfile were both set, but mpirun takes one. Leave one out.")
        if c.hostfile and c.hostfile.startswith("-"):
            raise DriverError(f"driver.hostfile={c.hostfile} was set; it is a file. Fix: name one, or ./{c.hostfile}.")
        if c.hostfile and not c.num_ranks:
            raise DriverError(
                f"driver.hostfile={c.hostfile} was set without driver.num_ranks. Set driver.num_ranks to all its ranks."
            )
        nproc = resolve_nproc(c.nproc_per_node, "driver.nproc_per_node", request.device)
        num_ranks = c.num_ranks or nproc * max(len(c.hosts), 1)
        env = {**rank_variables(request, c.threads_per_rank), **python_path(request)}
        flags = ["-np", str(num_ranks), "--bind-to", "none"]  # by default each rank is bound to one core
        check_hosts(c.hosts)
        if c.hosts:
            flags += ["--host", ",".join(f"{host}:{nproc}" for host in c.hosts)]
        elif c.hostfile:
            flags += ["--hostfile", c.hostfile]
        else:
            flags.append("--oversubscribe")
        if os.geteuid() == 0:
            flags.append("--allow-run-as-root")
        for name in sorted(env):
            flags += ["-x", name]
        # A rank ends with the daemon that started it, also when that is killed.
        program = guarded((sys.executable, *request.worker), parent_pid=0)
        return self.planned(
            request,
            (c.mpirun, *flags, *c.mpi_args, *program),
            nproc,
            num_ranks=num_ranks,
            summary=(f"processes: {num_ranks}", f"hosts: {c.hostfile or ', '.join(c.hosts) or 'this machine'}"),
            env=env,
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Run mpirun to its end."""
        replace(MPI, program=self.config.mpirun).require()
        clear_errors(request.log_dir)
        mark = new_mark()
        with swept(mark[MARK]):
            process = subprocess.Popen(
                guarded(plan.command),
                cwd=request.cwd,
                env={**os.environ, **plan.env, **mark},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                stderr=subprocess.PIPE,
            )
            words = LastWords(process)
            with forwarded(signals_to(process), lambda: os.killpg(process.pid, signal.SIGKILL)) as told:
                code = process.wait()
        failures = recorded_failures(request.log_dir, exit_codes(words.text())) if code else ()
        if code == EXIT_PREEMPTED and not failures:
            failures = (RankFailure(rank=0, exit_code=code),)
        message = f"error: mpirun ended with exit code {code}; what it said is above" if code and not failures else ""
        return Outcome(failures=failures, signum=told.signum, message=message, world_size=plan.world_size or 0)
