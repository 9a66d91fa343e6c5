"""``driver=slurm``: a batch job that goes on by itself after preemption and time limits."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

from everyrank.diagnosis.launcher_words import exit_codes
from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.diagnosis.rank_files import clear_errors, existing, log_file
from everyrank.drivers.cluster import SLURM, recorded_failures, secrets_of
from everyrank.drivers.driver import Driver, LaunchPlan, LaunchRequest, rank_variables
from everyrank.drivers.slurm_script import SlurmConfig, batch_script
from everyrank.elastic.signals import forwarded
from everyrank.errors import EXIT_FAILURE, EXIT_PREEMPTED, DriverError, did_you_mean

# Of the states in squeue's manual those from which a job does not come back. The others are many and may be brief, such
# as SIGNALING.
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
}
_PATIENCE_S = 60.0  # a controller that is restarted answers again by then


class SlurmDriver(Driver[SlurmConfig]):
    """Writes a batch script, submits it, and follows the job."""

    name = "slurm"
    config_type = SlurmConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan the job: its script is one of the plan's files."""
        c = self.config
        env = rank_variables(request, c.threads_per_rank)
        name = c.job_name or os.path.basename(request.run_dir)
        script = f"{request.run_dir}/job.sh"
        tasks = "a node, running torch's engine" if c.task_per == "node" else "a rank"
        return self.planned(
            request,
            ("sbatch", "--parsable", script),
            c.nproc_per_node,
            summary=(
                f"processes per node: {c.nproc_per_node} (one Slurm task {tasks})",
                f"nodes: {c.nodes}",
                f"partition: {c.partition or 'the default'}",
            ),
            files={script: batch_script(c, request, dict(env), name)},
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Submit the job and, with ``driver.wait``, follow it to its end."""
        SLURM.require()
        clear_errors(request.log_dir)
        job = self._submit(plan)
        log = f"{request.log_dir}/slurm-{job}.log"
        world_size = self.config.nodes * self.config.nproc_per_node
        if not self.config.wait:
            print(
                f"submitted as job {job}; its log: {log}\nsqueue -j {job} shows it, scancel {job} ends it", flush=True
            )
            return Outcome(world_size=world_size)
        print(f"submitted as job {job}", flush=True)
        signals = {signal.SIGUSR1: ("--signal=USR1",), signal.SIGUSR2: ("--signal=USR2",)}

        def send(signum: int) -> None:
            subprocess.run(["scancel", *signals.get(signal.Signals(signum), ()), job], check=False)

        with forwarded(send, lambda: send(signal.SIGKILL)) as told:
            state, code = self._follow(job, log_file(request.log_dir, 0))
        failures = recorded_failures(request.log_dir, exit_codes("\n".join(_last_lines(log, 200))))
        return self._outcome(job, state, code, log, told.signum, failures)

    def _submit(self, plan: LaunchPlan) -> str:
        done = subprocess.run(
            plan.command, capture_output=True, text=True, check=False, env={**os.environ, **secrets_of(plan.env)}
        )
        if done.returncode == 0:
            return done.stdout.strip().split(";")[0]
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        if "partition" in said.lower():
            there = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=False)
            names = sorted(set(there.stdout.split()))
            raise DriverError(
                f"driver.partition={self.config.partition} was set, but sbatch refused it: {said}. "
                f"This cluster has {', '.join(names) or 'no partition that you may use'}."
                f"{did_you_mean(self.config.partition, names)}"
            )
        raise DriverError(
            f"{shlex.join(plan.command)} refused the job: {said}. Mend the settings of driver=slurm that it names; "
            "driver.dry_run=true shows the script."
        )

    def _follow(self, job: str, rank_log: str) -> tuple[str, int]:
        """Show rank 0's log and the job's states until it ends; returns the last state and the exit code."""
        tail = _Tail(rank_log)
        shown, silent_since = "", time.monotonic()
        pause_s = min(0.2, self.config.poll_s)
        while True:
            tail.show()
            facts = _job_facts(job)
            state = facts.get("JobState", "")
            if state:
                silent_since = time.monotonic()
                place = facts.get("NodeList", "").replace("(null)", "") or facts.get("Reason", "")
                if (line := f"job {job}: {state} ({place})") != shown:
                    print(line, flush=True)
                    shown = line
                if has_ended(state):
                    tail.show()
                    code, _, signum = facts.get("ExitCode", "0:0").partition(":")
                    return state, int(code) or (128 + int(signum) if signum not in ("", "0") else 0)
            elif time.monotonic() - silent_since > _PATIENCE_S:
                return "UNKNOWN", EXIT_FAILURE
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self.config.poll_s)

    def _outcome(
        self, job: str, state: str, code: int, log: str, signum: int | None, failures: tuple[RankFailure, ...]
    ) -> Outcome:
        world_size = self.config.nodes * self.config.nproc_per_node
        if state == "COMPLETED":
            return Outcome(world_size=world_size)
        if state == "FAILED" and (failures or code == EXIT_PREEMPTED):
            failures = failures or (RankFailure(rank=0, exit_code=code, log_file=existing(log)),)
            return Outcome(failures=failures, world_size=world_size)
        if signum is not None:
            return Outcome(signum=signum, world_size=world_size)
        for line in _last_lines(log):
            print(line, file=sys.stderr)
        return Outcome(message=f"error: job {job} ended as {state} with exit code {code}\n  its log: {log}")


class _Tail:
    """Shows what is added to a file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._at = os.path.getsize(path) if os.path.exists(path) else 0

    def show(self) -> None:
        if os.path.exists(self._path):
            with open(self._path, encoding="utf-8", errors="replace") as file:
                file.seek(self._at)
                print(file.read(), end="", flush=True)
                self._at = file.tell()


def has_ended(state: str) -> bool:
    """Whether a job in this state of Slurm's has ended for good."""
    return state.split("+")[0] in _ENDED


def _job_facts(job: str) -> dict[str, str]:
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=False)
    pairs = (word.partition("=") for word in done.stdout.split())
    return {key: value for key, _, value in pairs}


def _last_lines(path: str, number: int = 20) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line.rstrip() for line in file.readlines()[-number:]]
    except OSError:
        return []
