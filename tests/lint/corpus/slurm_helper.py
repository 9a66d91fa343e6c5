"""A helper that several launchers use."""

import os
import subprocess

import torch
import torch.distributed as dist


def init_dist(launcher, backend="nccl"):
    if launcher == "pytorch":
        rank = int(os.environ["RANK"])
        torch.cuda.set_device(rank % torch.cuda.device_count())  # expect: ER001
        dist.init_process_group(backend)
    elif launcher == "slurm":
        proc_id = int(os.environ["SLURM_PROCID"])
        ntasks = int(os.environ["SLURM_NTASKS"])
        num_gpus = torch.cuda.device_count()
        torch.cuda.set_device(proc_id % num_gpus)  # expect: ER001
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = "29500"
        os.environ["MASTER_ADDR"] = subprocess.getoutput("scontrol show hostname | head -n1")
        os.environ["WORLD_SIZE"] = str(ntasks)
        os.environ["RANK"] = str(proc_id)
        dist.init_process_group(backend)


def reduce_dict(values):
    if dist.get_world_size() < 2:
        return values
    dist.all_reduce(values)
    return values


def start(script):
    command = ["python", "-m", "torch.distributed.launch", "--nproc_per_node=2", script]  # expect: ER004
    return subprocess.run(command, check=True)


def only_here():
    os.environ["MASTER_PORT"] = "29500"  # noqa: ER006
