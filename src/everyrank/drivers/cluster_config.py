"""Settings of the drivers that start runs through a cluster's own launcher."""

from __future__ import annotations

import sys
from typing import Literal

from everyrank.config.schema import field, section
from everyrank.drivers.config import DriverConfig


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
        default=True,
        doc="Go on by itself, from the checkpoint, after a preemption, a node failure or the time limit.",
    )
    signal_before_s: int = field(
        default=120, ge=0, doc="Tell the ranks so many seconds before the time limit, to save; 0: do not."
    )
    max_restarts: int = field(default=0, ge=0, doc="How often a failed group is started again in the job.")
    setup: list[str] = field(factory=list, doc="Shell lines before the start: module load, conda activate.")
    sbatch_args: list[str] = field(factory=list, doc="Further options of sbatch, as they are.")
    python: str = field(default=sys.executable, doc="Python on the nodes.")
    wait: bool = field(default=True, doc="Wait for the job and show rank 0's log; false: submit and return.")
    poll_s: float = field(default=2.0, gt=0, doc="Seconds between two looks at the job.")


@section
class MpiConfig(DriverConfig):
    """``driver=mpi``: Open MPI's mpirun."""

    nproc_per_node: int | str = field(default=2, doc="Ranks on each node, or auto, gpu, cpu.")
    hosts: list[str] = field(factory=list, doc="Hosts, each with nproc_per_node ranks; empty: this machine.")
    hostfile: str | None = field(default=None, doc="A hostfile of mpirun's instead of hosts.")
    num_ranks: int | None = field(default=None, ge=1, doc="All ranks, with a hostfile.")
    mpirun: str = field(default="mpirun", doc="The program.")
    mpi_args: list[str] = field(factory=list, doc="Further options of mpirun, as they are.")


@section
class RayConfig(DriverConfig):
    """``driver=ray``: Ray Train."""

    num_workers: int = field(default=2, ge=1, doc="Ranks.")
    address: str | None = field(default=None, doc="Address of a running cluster, or auto; null: start a local one.")
    use_gpu: bool = field(default=False, doc="One GPU for each rank.")
    cpus_per_worker: float = field(default=1.0, gt=0, doc="Cores that Ray sets aside for each rank.")
    max_failures: int = field(default=0, ge=-1, doc="How often Ray starts the ranks again; -1: without end.")


@section
class KubernetesConfig(DriverConfig):
    """``driver=kubernetes``: a PyTorchJob of the Kubeflow training operator."""

    image: str = field(default="", doc="Container image that has everyrank and your app; required.")
    nodes: int = field(default=1, ge=1, doc="Number of pods.")
    nproc_per_node: int = field(default=1, ge=1, doc="Ranks in each pod.")
    namespace: str = field(default="default", doc="Namespace of the job.")
    volume_claim: str | None = field(
        default=None,
        doc="PersistentVolumeClaim for the runs, mounted at env.output_dir; several nodes need one.",
    )
    gpus_per_node: int = field(default=0, ge=0, doc="GPUs of each pod.")
    cpus_per_node: int | None = field(default=None, ge=1, doc="Cores of each pod; null: no request.")
    memory_per_node: str | None = field(default=None, doc="Memory of each pod, for example 64Gi; null: no request.")
    working_dir: str | None = field(default=None, doc="Folder in the image to run in; null: the image's own.")
    python: str = field(default="python", doc="Python in the image.")
    backoff_limit: int = field(default=3, ge=0, doc="How often a failed job is started again.")
    master_port: int = field(default=23456, gt=0, lt=65536, doc="Port of the first pod, where the nodes meet.")
