"""``driver=local``: the app runs in this process, at world size 1."""

from __future__ import annotations

import os
import subprocess
import sys

from everyrank.config.schema import field, section
from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.drivers.driver import DriverConfig, LaunchPlan, LaunchRequest, rank_variables


@section
class LocalConfig(DriverConfig):
    """``driver=local``: this process, world size 1."""

    threads_per_rank: int = field(
        default=0,
        doc="`OMP_NUM_THREADS` of this process; 0: torch decides (all cores).",
    )


class LocalDriver:
    """One process, this one: the easiest to debug."""

    name = "local"
    config_type: type[DriverConfig] = LocalConfig

    def __init__(self, config: LocalConfig) -> None:
        self.config = config

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan a run in this process (or of the app's outside program)."""
        return LaunchPlan(
            driver=self.name,
            log_dir=request.log_dir,
            command=request.command or (sys.executable, *request.worker),
            nproc_per_node=1,
            summary=("processes: 1 (this one)",),
            env=rank_variables(request, self.config.threads_per_rank),
            files={request.config_file: request.config_text},
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Run an outside program to its end; an app in Python is run by the caller, in this process."""
        process = subprocess.run(plan.command, env={**os.environ, **plan.env}, cwd=request.cwd, check=False)
        failures = (RankFailure(rank=0, exit_code=process.returncode),) if process.returncode else ()
        return Outcome(failures=failures, world_size=1)
