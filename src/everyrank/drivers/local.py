"""``driver=local``: the app runs in this process, at world size 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from everyrank.config.schema import field, section
from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.drivers.driver import Driver, DriverConfig, LaunchPlan, LaunchRequest
from everyrank.elastic.guarded import guarded
from everyrank.elastic.signals import forwarded


@section
class LocalConfig(DriverConfig):
    """``driver=local``: this process, world size 1."""

    threads_per_rank: int = field(default=0, doc="`OMP_NUM_THREADS` of this process; 0: torch decides (all cores).")


class LocalDriver(Driver[LocalConfig]):
    """One process, this one: the easiest to debug."""

    name = "local"
    config_type = LocalConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan a run in this process (or of the app's outside program)."""
        return self.planned(
            request,
            (sys.executable, *request.worker),
            1,
            summary=("processes: 1 (this one)" if request.program is None else "processes: 1",),
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Run a program to its end; an app is run by the caller, in this process."""
        # In our own process group: it may read from the terminal, whose Ctrl-C reaches it without us.
        process = subprocess.Popen(guarded(plan.command), env={**os.environ, **plan.env}, cwd=request.cwd)
        in_terminal = sys.stdin is not None and sys.stdin.isatty()

        def send(signum: int) -> None:
            if not (in_terminal and signum == signal.SIGINT):
                process.send_signal(signum)

        with forwarded(send, process.kill) as told:
            code = process.wait()
        failures = (RankFailure(rank=0, exit_code=code),) if code else ()
        return Outcome(failures=failures, signum=told.signum, world_size=1)
