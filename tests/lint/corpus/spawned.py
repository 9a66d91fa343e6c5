"""A program that starts its own ranks, as the tutorials do."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

from models import Net, Words


def setup(rank, world_size):
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = "12355"  # expect: ER006
    dist.init_process_group("nccl", rank=rank, world_size=world_size)


def worker(rank, world_size):
    setup(rank, world_size)
    model = Net().to(rank)
    ddp_model = DDP(model, device_ids=[rank])
    loader = DataLoader(Words(), batch_size=8, shuffle=True)  # expect: ER203
    for batch in loader:
        ddp_model(batch.to(rank)).mean().backward()
    torch.save(ddp_model.state_dict(), "net.pt")  # expect: ER301, ER401
    dist.destroy_process_group()


def prepare():
    torch.save(torch.zeros(1), "ready.pt")


if __name__ == "__main__":
    world_size = torch.cuda.device_count()
    prepare()
    mp.spawn(worker, args=(world_size,), nprocs=world_size)
