"""The batch script of ``driver=slurm``."""

from __future__ import annotations

import re
import shlex
import sys
from typing import Literal

from everyrank.config.schema import field, section
from everyrank.drivers.cluster import exports, node_command
from everyrank.drivers.driver import DriverConfig, LaunchRequest
from everyrank.errors import EXIT_PREEMPTED, DriverError


@section
class SlurmConfig(DriverConfig):
    """``driver=slurm``: a batch job."""

    nodes: int = field(default=1, ge=1, doc="Number of nodes.")
    nproc_per_node: int = field(default=1, ge=1, doc="Ranks on each node; the login node cannot know the GPUs.")
    task_per: Literal["node", "rank"] = field(
        default="node",
        doc="One Slurm task a node, which runs torch's engine (restarts, blame, one import of torch), or one a rank.",
    )
    partition: str | None = field(default=None, doc="Partition; null: the cluster's default.")
    time: str | int | None = field(default=None, doc="Time limit as sbatch takes it: 2-00:00:00, or minutes.")
    account: str | None = field(default=None, doc="Account to charge.")
    qos: str | None = field(default=None, doc="Quality of service.")
    constraint: str | None = field(default=None, doc="Features the nodes must have.")
    cpus_per_rank: int | None = field(default=None, ge=1, doc="Cores for each rank; null: the cluster's default.")
    gpus_per_node: int | None = field(default=None, ge=0, doc="GPUs on each node; null: none is asked for.")
    mem: str | None = field(default=None, doc="Memory of a node, for example 64G.")
    job_name: str | None = field(default=None, doc="Name of the job; null: the name of the run.")
    requeue: bool = field(
        default=True, doc="Go on by itself, from the checkpoint, after a preemption, a node failure or the time limit."
    )
    signal_before_s: int = field(
        default=120, ge=0, doc="Tell the ranks so many seconds before the time limit, to save; 0: do not."
    )
    max_restarts: int = field(default=0, ge=0, doc="How often a failed group is started again in the job.")
    setup: list[str] = field(factory=list, doc="Shell lines before the start: module load, conda activate.")
    sbatch_args: list[str] = field(factory=list, doc="Further options of sbatch, as they are.")
    python: str | None = field(default=None, doc="Python on the nodes; null: the path of this one.")
    wait: bool = field(default=True, doc="Wait for the job and show rank 0's log; false: submit and return.")
    poll_s: float = field(default=2.0, gt=0, doc="Seconds between two looks at the job.")

    @property
    def num_nodes(self) -> int:
        """Nodes of the job."""
        return self.nodes


def batch_script(config: SlurmConfig, request: LaunchRequest, env: dict[str, str], name: str) -> str:
    """The whole script as text.

    Args:
        config: The driver's settings.
        request: The launch.
        env: Variables for the ranks.
        name: The job's name.
    """
    one_a_node = config.task_per == "node"
    lines = ["#!/bin/bash", *_directives(config, request, name, 1 if one_a_node else config.nproc_per_node), ""]
    lines += [*exports(env, request), f"cd {shlex.quote(request.cwd)} || exit 1", *config.setup]
    if one_a_node:
        lines += [
            'master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "port=$((15000 + SLURM_JOB_ID % 15000))",
            "export master port",
        ]
        flags = [f"driver.nproc_per_node={config.nproc_per_node}", f"driver.nnodes={config.nodes}"]
        flags.append(f"driver.max_restarts={config.max_restarts}")
        command = node_command(config.python or sys.executable, request, *flags, "NODE")
        rendezvous = '"driver.node_rank=$SLURM_NODEID" "driver.master_addr=$master" "driver.master_port=$port"'
        step = shlex.join(command).replace(" NODE", f" {rendezvous if config.nodes > 1 else ''}".rstrip(), 1)
        step = f"bash -c {shlex.quote('exec ' + step)}"
    else:
        step = shlex.join((config.python or sys.executable, *request.worker))
    # The first task to end must not end the others: rank 0 may still write the checkpoint. One whose peers are gone
    # gives up after distributed.timeout_s, and none is waited for longer than that.
    lines += [f"srun --kill-on-bad-exit=0 --wait={int(request.timeout_s)} {step}", "code=$?"]
    if config.requeue:
        # Only a job that Slurm still runs: not one that somebody cancelled, nor one that Slurm itself requeues.
        lines += [
            f'if [ "$code" -eq {EXIT_PREEMPTED} ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
            '    echo "preempted with a checkpoint: the job is put back into the queue"',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*lines, 'exit "$code"', ""])


def _directives(config: SlurmConfig, request: LaunchRequest, name: str, tasks_per_node: int) -> list[str]:
    c = config
    cpus = c.cpus_per_rank
    if cpus is not None and c.task_per == "node":
        cpus *= c.nproc_per_node
    options = {
        "job-name": name,
        "nodes": c.nodes,
        "ntasks-per-node": tasks_per_node,
        "cpus-per-task": cpus,
        "gpus-per-node": c.gpus_per_node or None,
        "mem": c.mem,
        "partition": c.partition,
        "time": c.time,
        "account": c.account,
        "qos": c.qos,
        "constraint": c.constraint,
        "output": f"{request.log_dir}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"USR1@{c.signal_before_s}" if c.signal_before_s and c.time else None,
    }
    lines = [f"#SBATCH --{key}={_quoted(key, value)}" for key, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if c.requeue else "#SBATCH --no-requeue")
    return [*lines, *(f"#SBATCH {_one_line('sbatch_args', argument)}" for argument in c.sbatch_args)]


def _quoted(key: str, value: object) -> str:
    """A value as sbatch reads it from a line of options: it knows quotes and backslashes as a shell does."""
    text = _one_line(key, value)
    if re.fullmatch(r"[\w@%+=:,./\[\]*&|!()-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _one_line(key: str, value: object) -> str:
    text = str(value)
    if not text.isprintable() or not text.strip():
        raise DriverError(
            f"driver.{key.replace('-', '_')}={text!r} was set, but an option of sbatch is one line of text. Fix: leave "
            "out line breaks and other characters that cannot be printed."
        )
    return text
