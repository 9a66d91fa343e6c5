"""A real Slurm: tasks of ``srun`` know who they are, and ``driver=slurm`` submits, follows, requeues and cancels."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.running import Running, wait_for

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]

JOINS = """
import everyrank, torch
with everyrank.join() as world:
    total = int(everyrank.reduce_sum(torch.tensor(world.rank)))
    print(f"rank {world.rank} of {world.size} by {world.environment.launcher}: {total}", flush=True)
"""


def test_tasks_of_srun_meet_without_flags_and_an_allocation_is_no_run(start_on: Start, slurm: dict[str, str]) -> None:
    tasks = start_on(0, "-N2", "-n3", sys.executable, "-c", JOINS, program=("srun",), env=slurm)
    shell = start_on(0, "-N2", "-n2", sys.executable, "-c", JOINS, program=("salloc", "--quiet"), env=slurm)
    assert tasks.wait() == 0, tasks.output
    for rank in range(3):
        assert f"rank {rank} of 3 by slurm: 3" in tasks.output
    assert shell.wait() == 0, shell.output
    assert "rank 0 of 1 by python: 0" in shell.output


@pytest.mark.parametrize("task_per", ["node", "rank"])
def test_driver_slurm_runs_a_job_and_shows_rank_0(start_on: Start, slurm: dict[str, str], task_per: str) -> None:
    launch = start_on(
        0,
        *("driver=slurm", "app=hello_dist", "driver.nodes=2", "driver.nproc_per_node=2", "driver.partition=work"),
        *("driver.time=10", f"driver.task_per={task_per}", "driver.poll_s=0.2"),
        env=slurm,
    )
    assert launch.wait() == 0, launch.output
    assert "[Rank 0] Sum of all ranks: 6" in launch.output
    assert "All 4 processes completed successfully!" in launch.output
    assert ": COMPLETED (node[1-2])" in launch.output


def test_a_failure_in_a_job_names_the_rank(start_on: Start, slurm: dict[str, str]) -> None:
    launch = start_on(
        0,
        *("driver=slurm", "app=custom", "app._target_=probe_apps.RaisesOnRank", "+app.guilty=1"),
        *("driver.nproc_per_node=2", "driver.poll_s=0.2"),
        env=slurm,
    )
    assert launch.wait() == 1, launch.output
    assert "rank 1" in launch.output
    assert "LookupError: the sample 1 is missing" in launch.output


def test_a_preempted_job_goes_on_by_itself_and_a_cancelled_one_does_not(
    start_on: Start, slurm: dict[str, str], tmp_path: Path
) -> None:
    """SIGUSR1, which Slurm sends before the time limit, and a job of more urgency, which takes the nodes."""
    folder = tmp_path / "job"
    folder.mkdir()
    launch = start_on(
        0,
        *("driver=slurm", "app=custom", "app._target_=elastic_apps.Loops", f"+app.folder={folder}"),
        *("driver.nodes=2", "driver.nproc_per_node=1", "driver.partition=work", "driver.poll_s=0.2"),
        env=slurm,
    )

    def runs_again(steps: int) -> None:
        def explain() -> str:
            return f"the job did not go on after step {steps}:\n{launch.output}"

        wait_for(lambda: (folder / "world-0-2").exists() and _steps(folder) > steps, 45, explain)

    def told(*command: str) -> int:
        helper = start_on(0, program=command, env=slurm)
        assert helper.wait() == 0, helper.output
        launch.until_says("PENDING (BeginTime)")
        (folder / "world-0-2").unlink()
        return _steps(folder)

    runs_again(0)
    job = launch.output.split("submitted as job ")[1].split()[0]
    saved = told("scancel", "--signal=USR1", job)
    assert f"told to stop by SIGUSR1 after step {saved}" in launch.output
    runs_again(saved)

    urgent = start_on(0, program=("srun", "--partition=urgent", "-N2", "--exclusive", "true"), env=slurm)
    assert urgent.wait() == 0, urgent.output
    launch.until_says("told to stop by SIGTERM")

    launch.process.send_signal(signal.SIGINT)
    assert launch.wait() == 130, launch.output
    queue = start_on(0, program=("squeue", "--noheader", "--jobs", job), env=slurm)
    queue.wait()
    assert job not in queue.output


def _steps(folder: Path) -> int:
    return int(json.loads((folder / "state.json").read_text())["steps"])


def test_a_partition_that_does_not_exist_and_a_job_not_waited_for(start_on: Start, slurm: dict[str, str]) -> None:
    wrong = start_on(0, "driver=slurm", "app=hello_dist", "driver.partition=wrok", env=slurm)
    free = start_on(0, "driver=slurm", "app=hello_dist", "app.message=Hi", "driver.wait=false", env=slurm)
    assert wrong.wait() == 2
    assert "driver.partition=wrok was set, but sbatch refused it" in wrong.output
    assert "This cluster has urgent, work. Did you mean 'work'?" in wrong.output
    assert free.wait() == 0
    assert "scancel" in free.output
