"""Which launcher started the process: a table of what real launchers set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from everyrank.errors import LaunchEnvironmentError
from everyrank.launch_env.detection import ProcessEnvironment, detect, detect_with_arguments

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job7",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_JOB_NAME": "train",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "PMIX_NAMESPACE": "2413756417",
    "PMIX_RANK": "1",
}
TWO_NODES = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_MCA_orte_num_nodes": "2"}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_PORT": "head:40123"}
KUBERNETES = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
LOCAL = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456"}

CASES = {
    "plain Python": ({}, ["train.py"], {"launcher": "python", "rank": 0, "world_size": 1, "master_addr": None}),
    "a stray MASTER_ADDR": ({"MASTER_ADDR": "x"}, [], {"launcher": "python", "world_size": 1}),
    "torchrun": (
        TORCHRUN,
        ["train.py"],
        {
            "launcher": "torchrun",
            "detected_by": "TORCHELASTIC_RUN_ID",
            "rank": 5,
            "local_rank": 1,
            "world_size": 8,
            "local_world_size": 4,
            "node_rank": 1,
            "num_nodes": 2,
            "master_addr": "node1",
            "master_port": 29500,
            "run_id": "job7",
            "restart_count": 2,
        },
    ),
    "launch, hyphen": (TORCHRUN, ["train.py", "--local-rank=1"], {"launcher": "launch", "local_rank": 1}),
    "launch, underscore": (TORCHRUN, ["train.py", "--local_rank", "1"], {"launcher": "launch", "local_rank": 1}),
    "an old launch that sets no LOCAL_RANK": (
        KUBERNETES,
        ["train.py", "--local_rank=1"],
        {"launcher": "launch", "local_rank": 1, "rank": 2},
    ),
    "torchrun inside Slurm": (SLURM | TORCHRUN, [], {"launcher": "torchrun", "rank": 5}),
    "torchrun inside mpirun": (OPENMPI | TORCHRUN, [], {"launcher": "torchrun", "rank": 5}),
    "a Slurm step": (
        SLURM,
        [],
        {
            "launcher": "slurm",
            "detected_by": "SLURM_PROCID",
            "rank": 3,
            "local_rank": 1,
            "world_size": 4,
            "local_world_size": 2,
            "node_rank": 1,
            "num_nodes": 2,
            "master_addr": "gpu07",
            "run_id": "4711.0",
        },
    ),
    "a Slurm step of uneven nodes": (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,3"}, [], {"local_world_size": 3}),
    "a Slurm step smaller than its job": (SLURM | {"SLURM_NTASKS": "64"}, [], {"world_size": 4}),
    "a Slurm step on one node": (
        SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"},
        [],
        {"master_addr": "127.0.0.1", "local_world_size": 4, "num_nodes": 1},
    ),
    "a Slurm step with exported master": (
        SLURM | {"MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "1234", "WORLD_SIZE": "4"},
        [],
        {"launcher": "slurm", "master_addr": "ib-gpu07", "master_port": 1234},
    ),
    "Slurm's batch script": (
        {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"},
        [],
        {"launcher": "python", "world_size": 1},
    ),
    "Slurm's batch step": (SLURM | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, [], {"launcher": "python", "world_size": 1}),
    "Slurm's interactive step": (SLURM | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, [], {"world_size": 1}),
    "srun --pty bash": (SLURM | {"SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}, [], {"world_size": 1}),
    "srun --pty": (SLURM | {"SLURM_PTY_PORT": "4242", "SLURM_PROCID": "0"}, [], {"world_size": 1}),
    "Open MPI on one node": (
        OPENMPI,
        [],
        {
            "launcher": "openmpi",
            "detected_by": "OMPI_COMM_WORLD_RANK",
            "rank": 1,
            "local_rank": 1,
            "world_size": 2,
            "local_world_size": 2,
            "node_rank": 0,
            "num_nodes": 1,
            "master_addr": "127.0.0.1",
        },
    ),
    "Open MPI by slot on two nodes": (
        OPENMPI | TWO_NODES | {"OMPI_MCA_orte_hnp_uri": "158189.0;tcp://10.0.0.7,172.17.0.1:41025"},
        [],
        {"node_rank": 1, "num_nodes": 2, "master_addr": "10.0.0.7"},
    ),
    "Open MPI by node on two nodes": (
        OPENMPI | TWO_NODES | {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
        [],
        {"node_rank": 0, "num_nodes": 2},
    ),
    "MPICH or Intel MPI": (
        PMI,
        [],
        {
            "launcher": "pmi",
            "rank": 3,
            "local_rank": 1,
            "local_world_size": 2,
            "node_rank": 1,
            "num_nodes": 2,
            "master_addr": "head",
        },
    ),
    "plain PMI": ({"PMI_RANK": "1", "PMI_SIZE": "2"}, [], {"launcher": "pmi", "local_rank": 1, "num_nodes": 1}),
    "a step from the shell of srun --pty": (
        SLURM | {"SLURM_JOB_NAME": "bash", "SLURM_PTY_PORT": "4242", "SLURM_STEP_ID": "1", "SLURM_PROCID": "0"},
        [],
        {"launcher": "slurm", "world_size": 4},
    ),
    "a step from the shell of salloc": (
        SLURM | {"SLURM_JOB_NAME": "interactive", "SLURM_PTY_PORT": "4242", "SLURM_PROCID": "0"},
        [],
        {"launcher": "slurm", "world_size": 4},
    ),
    "srun python in a job named bash": (
        SLURM | {"SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0", "SLURM_TASK_PID": str(os.getpid())},
        [],
        {"launcher": "slurm", "world_size": 4},
    ),
    "srun --mpi=pmi2": (SLURM | PMI, [], {"launcher": "slurm"}),
    "mpiexec that reached its nodes by srun": (SLURM | PMI | {"SLURM_PROCID": "1"}, [], {"launcher": "pmi"}),
    "Kubernetes": (
        KUBERNETES,
        [],
        {"launcher": "environment", "detected_by": "RANK", "local_rank": 0, "local_world_size": 1, "num_nodes": 4},
    ),
    "an old PyTorchJob's master": (
        KUBERNETES | {"RANK": "0", "MASTER_ADDR": "localhost", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        [],
        {"local_rank": 0, "local_world_size": 1, "num_nodes": 4},
    ),
    "variables set by hand on one machine": (LOCAL, [], {"local_rank": 1, "local_world_size": 2, "num_nodes": 1}),
    "Ray Train": (
        LOCAL | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "RAY_JOB_ID": "01000000"},
        [],
        {"launcher": "ray", "detected_by": "RAY_JOB_ID", "rank": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_recognises(name: str) -> None:
    environ, argv, expected = CASES[name]
    found = detect(environ, argv)
    assert {key: getattr(found, key) for key in expected} == expected


def test_all_tasks_of_a_job_derive_one_port_and_other_jobs_another() -> None:
    ports = {detect(SLURM | {"SLURM_PROCID": str(r)}, []).master_port for r in range(4)}
    assert len(ports) == 1
    others = {detect(SLURM | {"SLURM_JOB_ID": str(job)}, []).master_port for job in range(20)}
    assert len(others) > 15
    assert all(port is not None and 15000 <= port < 30000 for port in others | ports)
    assert detect(OPENMPI, []).master_port == detect(OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"}, []).master_port


BAD = {
    "RANK alone": ({"RANK": "0"}, [], ("RANK=0", "WORLD_SIZE is missing")),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, [], ("WORLD_SIZE=2", "RANK is missing")),
    "LOCAL_RANK alone": (
        {"LOCAL_RANK": "0", "MASTER_PORT": "1"},
        [],
        ("LOCAL_RANK=0, MASTER_PORT=1", "RANK is missing"),
    ),
    "--local-rank alone": ({}, ["--local-rank=0"], ("--local-rank", "RANK is missing", "Set: none")),
    "no number": ({"RANK": "one", "WORLD_SIZE": "2"}, [], ("RANK='one' is not an integer",)),
    "rank too large": ({"RANK": "2", "WORLD_SIZE": "2"}, [], ("rank 2 is not in 0..1",)),
    "rank negative": ({"RANK": "-1", "WORLD_SIZE": "2"}, [], ("rank -1 is not in 0..1",)),
    "no world": ({"RANK": "0", "WORLD_SIZE": "0"}, [], ("world size is 0",)),
    "local rank too large": (TORCHRUN | {"LOCAL_RANK": "4"}, [], ("local rank 4 is not in 0..3",)),
    "local world too large": (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, [], ("9 is greater than the world size 8",)),
    "port": (LOCAL | {"MASTER_PORT": "70000"}, [], ("70000",)),
    "argument and variable": (TORCHRUN, ["--local-rank=3"], ("LOCAL_RANK=1", "--local-rank=3")),
    "Slurm and WORLD_SIZE": (SLURM | {"WORLD_SIZE": "8"}, [], ("WORLD_SIZE=8", "4 tasks")),
    "Slurm without LOCALID": (
        {k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"},
        [],
        ("SLURM_LOCALID is missing",),
    ),
    "Open MPI half": ({"OMPI_COMM_WORLD_RANK": "0"}, [], ("OMPI_COMM_WORLD_SIZE is missing",)),
    "PMI half": ({"PMI_RANK": "0"}, [], ("PMI_SIZE is missing",)),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_is_half_set_or_contradictory(name: str) -> None:
    environ, argv, parts = BAD[name]
    with pytest.raises(LaunchEnvironmentError) as caught:
        detect(environ, argv)
    for part in (*parts, "Set: ", "Fix: "):
        assert part in str(caught.value)


def test_arguments_win_over_variables() -> None:
    found = detect_with_arguments(SLURM, [], rank=1, world_size=2)
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("spawn", 1, 2, 1)
    assert (found.master_addr, found.master_port, found.num_nodes) == ("localhost", 12355, 1)
    assert detect_with_arguments({"RANK": "7"}, [], rank=0, world_size=1).world_size == 1  # half-set, but not needed
    moved = detect_with_arguments(TORCHRUN, [], master_port="4000", master_addr="other")
    assert (moved.launcher, moved.rank, moved.master_addr, moved.master_port) == ("torchrun", 5, "other", 4000)


def test_arguments_that_repeat_the_launchers_keep_what_else_it_said() -> None:
    found = detect_with_arguments(TORCHRUN, [], rank=5, world_size=8)
    assert found == detect(TORCHRUN, [])


def test_arguments_for_a_remote_master_are_not_taken_for_one_machine() -> None:
    found = detect_with_arguments({"LOCAL_RANK": "1"}, [], rank=3, world_size=4, master_addr="node1", master_port=9)
    assert (found.local_rank, found.local_world_size, found.num_nodes, found.node_rank) == (1, 2, 2, 1)


@pytest.mark.parametrize(
    "arguments", [{"rank": 0}, {"world_size": 2}, {"rank": 2, "world_size": 2}, {"master_port": "x"}]
)
def test_refuses_half_or_contradictory_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(LaunchEnvironmentError, match="Fix: "):
        detect_with_arguments({}, [], **arguments)  # type: ignore[arg-type]


def test_the_environment_is_frozen_and_needs_no_torch() -> None:
    with pytest.raises(AttributeError):
        ProcessEnvironment().rank = 1  # type: ignore[misc]
    code = "import sys, everyrank.launch_env.detection as e; e.detect(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
