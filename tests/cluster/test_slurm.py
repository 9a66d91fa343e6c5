"""A real Slurm: tasks of ``srun`` know who they are, and ``driver=slurm`` submits, follows, requeues and cancels."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.running import PATIENCE_S, Running, wait_for
from everyrank.training.saving.ledger import read_ledger

pytestmark = pytest.mark.cluster
Start = Callable[..., Running]

JOINS = """
import everyrank, torch
with everyrank.join() as world:
    total = int(everyrank.reduce_sum(torch.tensor(world.rank)))
    print(f"rank {world.rank} of {world.world_size} by {world.launcher}: {total}", flush=True)
"""


def test_tasks_of_srun_meet_without_flags_and_an_allocation_is_no_run(start_on: Start, slurm: dict[str, str]) -> None:
    tasks = start_on(0, "-N2", "-n3", sys.executable, "-c", JOINS, program=("srun",), env=slurm)
    shell = start_on(0, "-N2", "-n2", sys.executable, "-c", JOINS, program=("salloc", "--quiet"), env=slurm)
    assert tasks.wait() == 0, tasks.output
    for rank in range(3):
        assert f"rank {rank} of 3 by slurm: 3" in tasks.output
    assert shell.wait() == 0, shell.output
    assert "rank 0 of 1 by python: 0" in shell.output


@pytest.mark.skipif(shutil.which("script") is None, reason="script (Debian: bsdutils) is not installed")
def test_a_shell_in_a_terminal_of_srun_is_no_run(start_on: Start, slurm: dict[str, str], tmp_path: Path) -> None:
    """What is typed there has the variables of task 0 of 2, and would wait for a rank that nobody started."""
    (tmp_path / "train.py").write_text(JOINS)
    typed = f"{sys.executable} train.py\nexit\n"
    terminal = "script --quiet --return --command 'srun -N1 -n2 --pty bash' /dev/null"
    shell = start_on(0, "-c", f'printf "$0" | {terminal}', typed, program=("sh",), env=slurm)
    assert shell.wait() == 0, shell.output
    assert "rank 0 of 1 by python: 0" in shell.output


@pytest.mark.nightly  # by day jobs that fail and jobs that are preempted, below, and test_scripts.py with a task a rank
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

        wait_for(lambda: (folder / "world-0-2").exists() and _steps(folder) > steps, PATIENCE_S, explain)

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


class Training:
    """A job that trains on two nodes until it is done, however often it is put back into the queue."""

    def __init__(self, start_on: Start, slurm: dict[str, str], num_epochs: int, *settings: str) -> None:
        self.num_epochs = num_epochs
        self.launch = start_on(
            0,
            *("driver=slurm", "app=certify", f"app.training.num_epochs={num_epochs}", "driver.poll_s=0.2"),
            *("driver.nodes=2", "driver.nproc_per_node=1", "driver.partition=work", *settings),
            env=slurm,
        )

    def goes_on_to_its_end(self, folder: Path) -> None:
        """Back into the queue, on from the checkpoint, and each sample of each epoch exactly once."""
        assert self.launch.wait(360) == 0, self.launch.output
        assert "PENDING (BeginTime)" in self.launch.output
        assert self.launch.output.count(": RUNNING (node[1-2])") >= 2, self.launch.output
        assert "everyrank.training: Resuming from" in self.launch.output
        (ledger,) = folder.glob("outputs/*/ledger")
        uses = Counter((entry["epoch"], sample) for entry in read_ledger(ledger) for sample in entry["samples"])
        assert set(uses.values()) == {1}
        assert len(uses) == self.num_epochs * len({sample for _, sample in uses})


@pytest.mark.nightly
def test_a_time_limit_puts_the_job_back_and_it_goes_on_to_its_end(
    start_on: Start, slurm: dict[str, str], tmp_path: Path
) -> None:
    """The signal is the one that Slurm itself sends before the job's own limit of a minute, to its clock of 30 s.

    The samples alone take longer than that: 103 an epoch, 0.01 s each, on two ranks.
    """
    training = Training(start_on, slurm, 90, "driver.time=1", "driver.signal_before_s=20")
    training.goes_on_to_its_end(tmp_path)


@pytest.mark.nightly
def test_a_preempted_job_goes_on_to_its_end(start_on: Start, slurm: dict[str, str], tmp_path: Path) -> None:
    training = Training(start_on, slurm, 25)
    wait_for(lambda: any(tmp_path.glob("outputs/*/ledger/step-*.jsonl")), PATIENCE_S, lambda: training.launch.output)
    urgent = start_on(0, program=("srun", "--partition=urgent", "-N2", "--exclusive", "true"), env=slurm)
    assert urgent.wait() == 0, urgent.output
    training.goes_on_to_its_end(tmp_path)


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


@pytest.mark.nightly
def test_the_certificate_holds_for_srun_and_mpirun(start_on: Start, slurm: dict[str, str]) -> None:
    """On a cluster that answers, ``everyrank certify`` finds srun, whose weights are those of our own driver."""
    command = (sys.executable, "-m", "everyrank", "certify")
    certify = start_on(
        0,
        "--launchers=driver=torchrun,srun,mpirun",
        "app=certify",
        "app.data.kwargs.delay_s=0",
        "app.training.num_epochs=1",
        program=command,
        env=slurm,
    )
    assert certify.wait(400) == 0, certify.output
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in certify.output.splitlines() if "│" in line]
    assert [(line[0], line[3], line[5]) for line in lines] == [
        (name, "yes", "yes") for name in ("python", "driver=torchrun", "srun", "mpirun")
    ]
    # Nothing is compared with itself: one process, and the first run of two ranks, are what the others are held to.
    for line in lines:
        assert line[4].startswith(("bitwise", "reference")), (
            f"the weights of {line[0]} are not those of driver=torchrun"
        )
    assert [line[0] for line in lines if "reference" in line[4]] == ["python", "driver=torchrun"]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_certificate_holds_for_every_launcher(start_on: Start, slurm: dict[str, str]) -> None:
    certify = start_on(0, program=(sys.executable, "-m", "everyrank", "certify"), env=slurm)
    assert certify.wait(800) == 0, certify.output
    for launcher in ("python", "torchrun", "spawn", "launch", "mpirun", "srun", "driver=ray"):
        assert launcher in certify.output
    assert "not on this machine" not in certify.output
