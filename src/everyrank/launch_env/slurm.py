"""Slurm job steps (``srun``): who this task is, from the variables Slurm sets, without calling ``scontrol``."""

from __future__ import annotations

import os
from collections.abc import Mapping

from everyrank.launch_env.hostlist import expand_hostlist, first_host
from everyrank.launch_env.process_environment import ProcessEnvironment, environment_error, read_int, require_int
from everyrank.launch_env.rendezvous_port import derive_port

_SPECIAL_STEPS = 0xFFFFFFF0  # slurm.h: the batch script, the interactive and external steps number down from 2**32 - 2
_SHELLS = frozenset({"bash", "sh", "zsh", "fish", "tcsh", "csh", "ksh", "dash"})


def detect_slurm(environ: Mapping[str, str]) -> ProcessEnvironment | None:
    """Return the place of a Slurm task, or None where this process is no task of a parallel step.

    The batch script, an interactive shell inside an allocation (``salloc``, ``srun --pty bash``) and what is typed
    there have Slurm's variables too, but they are one process and not a distributed run.
    """
    if "SLURM_PROCID" not in environ or not _is_parallel_step(environ) or _is_other_mpi(environ):
        return None
    rank = require_int(environ, "SLURM_PROCID", "SLURM_STEP_ID")
    world_size = _world_size(environ)
    nodelist = (
        environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    )
    num_nodes = read_int(environ, "SLURM_STEP_NUM_NODES") or read_int(environ, "SLURM_NNODES")
    num_nodes = num_nodes or max(len(expand_hostlist(nodelist)), 1)
    node_rank = read_int(environ, "SLURM_NODEID", 0) or 0
    job_id = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID", "")
    step_id = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID", "")
    restarts = read_int(environ, "SLURM_RESTART_COUNT", 0) or 0
    own_addr, own_port = environ.get("MASTER_ADDR"), read_int(environ, "MASTER_PORT")
    return ProcessEnvironment(
        launcher="slurm",
        detected_by="SLURM_PROCID",
        rank=rank,
        local_rank=require_int(environ, "SLURM_LOCALID", "SLURM_PROCID"),
        world_size=world_size,
        local_world_size=_local_world_size(environ, node_rank, world_size, num_nodes),
        node_rank=node_rank,
        num_nodes=num_nodes,
        master_addr=own_addr or ("127.0.0.1" if num_nodes == 1 else first_host(nodelist)),
        master_port=own_port or derive_port("slurm", job_id, step_id, str(restarts)),
        run_id=f"{job_id}.{step_id}",
        restart_count=restarts,
    )


def _is_parallel_step(environ: Mapping[str, str]) -> bool:
    """Tell whether this is a task of a step that was started to run in parallel."""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID", "")
    if not step.isdigit() or int(step) >= _SPECIAL_STEPS:
        return False
    if environ.get("SLURM_TASK_PID") == str(os.getpid()) or environ["SLURM_PROCID"] != "0" or step != "0":
        return True
    # What is typed in the shell of `srun -n4 --pty bash` has the variables of task 0 of step 0. A step started from
    # such a shell inherits the name and the terminal's variables, but has a later number; one started from the shell of
    # salloc may be step 0 too, and is told by the name salloc gives.
    name = environ.get("SLURM_JOB_NAME", "")
    return not (name in _SHELLS or ("SLURM_PTY_PORT" in environ and name != "interactive"))


def _is_other_mpi(environ: Mapping[str, str]) -> bool:
    """Tell whether PMI's variables are those of an ``mpiexec`` that only used Slurm to reach its nodes."""
    return "PMI_RANK" in environ and environ["PMI_RANK"] != environ["SLURM_PROCID"]


def _world_size(environ: Mapping[str, str]) -> int:
    """Return the number of tasks of the step (not of the job, which may be larger)."""
    world_size = read_int(environ, "SLURM_STEP_NUM_TASKS") or require_int(environ, "SLURM_NTASKS", "SLURM_PROCID")
    said = read_int(environ, "WORLD_SIZE")  # many batch scripts export it: welcome if it says the same
    if said is not None and said != world_size:
        raise environment_error(
            f"the launch environment contradicts itself: WORLD_SIZE={said}, but the Slurm step has {world_size} tasks",
            environ,
            "do not export WORLD_SIZE in a job script that starts one task a rank by srun, "
            "or start torchrun with one task a node.",
        )
    return world_size


def _local_world_size(environ: Mapping[str, str], node_rank: int, world_size: int, num_nodes: int) -> int:
    """Return this node's number of tasks from, for example, ``SLURM_STEP_TASKS_PER_NODE=2(x3),1``."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for item in filter(None, text.split(",")):
        tasks, _, times = item.partition("(x")
        try:
            counts += [int(tasks)] * int(times.rstrip(")") or 1)
        except ValueError:
            counts = []
            break
    if node_rank < len(counts) and sum(counts) == world_size:
        return counts[node_rank]
    return -(-world_size // num_nodes)
