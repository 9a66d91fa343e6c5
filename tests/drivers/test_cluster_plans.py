"""The plans of the cluster drivers, as text; nothing is started."""

from __future__ import annotations

import pytest

from everyrank.config.schema import build
from everyrank.drivers.driver import LaunchPlan, LaunchRequest
from everyrank.drivers.mpi import MpiConfig, MpiDriver
from everyrank.drivers.slurm import SlurmDriver, has_ended
from everyrank.drivers.slurm_script import SlurmConfig
from everyrank.drivers.torchrun import TorchrunDriver
from everyrank.drivers.torchrun_config import TorchrunConfig
from everyrank.errors import DriverError
from everyrank.rendezvous.ports import split_endpoint

REQUEST = LaunchRequest(
    config_file="/runs/a/run.yaml",
    config_text="app: {}\n",
    run_dir="/runs/a",
    cwd="/home/me/my project",
    env={"NCCL_DEBUG": "INFO"},
    device="cpu",
    timeout_s=900.0,
)


def slurm_script(**settings: object) -> str:
    config = build(SlurmConfig, {"python": "/env/bin/python", **settings})
    return SlurmDriver(config).plan(REQUEST).files["/runs/a/job.sh"]


def test_a_batch_script_asks_for_what_was_set() -> None:
    script = slurm_script(
        nodes=2,
        nproc_per_node=4,
        partition="work",
        time="2-00:00:00",
        gpus_per_node=4,
        cpus_per_rank=3,
        setup=["module load cuda"],
        sbatch_args=["--exclusive"],
    )
    for option in (
        *("job-name=a", "nodes=2", "ntasks-per-node=1", "cpus-per-task=12", "gpus-per-node=4", "partition=work"),
        *("time=2-00:00:00", "output=/runs/a/logs/slurm-%j.log", "signal=USR1@120", "requeue", "exclusive"),
    ):
        assert f"#SBATCH --{option}\n" in script
    assert "export NCCL_DEBUG=INFO\n" in script
    assert "cd '/home/me/my project' || exit 1\nmodule load cuda\n" in script
    assert "srun --kill-on-bad-exit=0 --wait=900 bash -c 'exec /env/bin/python -m everyrank.drivers.node" in script
    assert '"driver.node_rank=$SLURM_NODEID" "driver.master_addr=$master" "driver.master_port=$port"' in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_a_batch_script_of_one_task_a_rank_without_requeue() -> None:
    script = slurm_script(nodes=2, nproc_per_node=4, task_per="rank", requeue=False, cpus_per_rank=3)
    assert "#SBATCH --ntasks-per-node=4\n" in script
    assert "#SBATCH --cpus-per-task=3\n" in script
    assert "#SBATCH --no-requeue\n" in script
    assert "scontrol requeue" not in script
    assert "--signal" not in script, "without a time limit there is nothing to warn of"
    assert (
        "srun --kill-on-bad-exit=0 --wait=900 /env/bin/python -m everyrank.worker --config /runs/a/run.yaml" in script
    )


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SIGNALING", "REQUEUE_FED", "RESIZING"])
def test_a_job_in_a_passing_state_is_followed_further(state: str) -> None:
    """SIGNALING was once taken for the end, while Slurm told the ranks to leave."""
    assert not has_ended(state)
    assert has_ended("COMPLETED")


def test_one_node_of_slurm_needs_no_master() -> None:
    assert "driver.master_addr" not in slurm_script(nproc_per_node=2)


def mpi_plan(**settings: object) -> LaunchPlan:
    return MpiDriver(build(MpiConfig, settings)).plan(REQUEST)


def test_mpirun_gets_hosts_and_no_binding() -> None:
    command = " ".join(mpi_plan(nproc_per_node=2, hosts=["a", "b"]).command)
    assert command.startswith("mpirun -np 4 --bind-to none --host a:2,b:2 ")
    assert "-x NCCL_DEBUG" in command
    assert "--oversubscribe" not in command
    assert "-np 6 --bind-to none --hostfile hosts.txt" in " ".join(mpi_plan(hostfile="hosts.txt", num_ranks=6).command)
    with pytest.raises(DriverError, match=r"without driver\.num_ranks"):
        mpi_plan(hostfile="hosts.txt")
    with pytest.raises(DriverError, match="both set"):
        mpi_plan(hostfile="hosts.txt", hosts=["a"])


def test_ssh_plans_one_command_a_host() -> None:
    config = build(TorchrunConfig, {"hosts": ["me@a", "b"], "nproc_per_node": 8, "ssh_args": ["-p", "2222"]})
    text = TorchrunDriver(config).plan(REQUEST).render()
    assert "ssh -o BatchMode=yes -p 2222 me@a" in text
    assert "driver.node_rank=1 driver.master_addr=a driver.master_port=29500" in text
    with pytest.raises(DriverError, match="The hosts are the nodes"):
        TorchrunDriver(build(TorchrunConfig, {"hosts": ["a", "b"], "nnodes": 3})).plan(REQUEST)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [("a:1", ("a", 1)), ("a", ("a", 29500)), ("[::1]:7", ("::1", 7)), ("fe80::1", ("fe80::1", 29500))],
)
def test_endpoints(endpoint: str, expected: tuple[str, int]) -> None:
    assert split_endpoint(endpoint, "driver.rdzv_endpoint") == expected


@pytest.mark.parametrize("endpoint", ["a:0", "a:99999", ":29500", "a:b"])
def test_wrong_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(DriverError, match=r"driver\.rdzv_endpoint="):
        split_endpoint(endpoint, "driver.rdzv_endpoint")
