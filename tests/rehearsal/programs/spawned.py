"""Ranks of ``mp.spawn``, as many as there are GPUs: every kind of collective, and SyncBatchNorm beside one process."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def collectives(rank, world_size):
    assert dist.get_backend() == "nccl"
    assert dist.is_nccl_available()
    dist.barrier(device_ids=[rank])
    mine = torch.full((2, 3), float(rank), device="cuda")
    total = mine.clone()
    dist.all_reduce(total, op=dist.ReduceOp.AVG)
    assert total.mean() == (world_size - 1) / 2
    stacked = torch.empty(world_size, 2, 3, device="cuda")
    dist.all_gather_into_tensor(stacked, mine)
    assert stacked.mean(dim=(1, 2)).tolist() == list(range(world_size))
    shared = torch.empty(3, device="cuda")
    dist.reduce_scatter_tensor(output=shared, input=stacked[:, 0].contiguous())
    assert shared.tolist() == [world_size * rank] * 3
    received = [torch.empty(2, 3, device="cuda") for _ in range(world_size)]
    dist.all_to_all(received, [mine + 10 * other for other in range(world_size)])
    assert [part.mean().item() for part in received] == [10 * rank + other for other in range(world_size)]
    half = torch.ones(4, device="cuda", dtype=torch.bfloat16)
    dist.all_reduce(half)
    assert half.tolist() == [world_size] * 4
    said = ["from rank 0" if rank == 0 else None]
    dist.broadcast_object_list(said, src=0, device=torch.device("cuda", rank))
    assert said == ["from rank 0"]
    group = dist.new_group(list(range(world_size)), backend="nccl", pg_options=dist.ProcessGroupNCCL.Options())
    assert dist.get_backend(group) == "nccl"
    if rank == 0:
        dist.send(mine, 1, group=group)
    elif rank == 1:
        dist.recv(mine, 0, group=group)
        assert mine.eq(0).all()


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()


def steps(model, images):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (model(images) ** 2).mean().backward()
        optimizer.step()
    return [value.cpu() for value in model.state_dict().values()]


def worker(rank, world_size):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=world_size)
    collectives(rank, world_size)
    images = torch.randn(4 * world_size, 1, 6, 6, dtype=torch.double, generator=torch.Generator().manual_seed(7))
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(network()).to(rank), device_ids=[rank])
    mine = steps(model, images[4 * rank : 4 * (rank + 1)].to(rank))
    alone = steps(network(), images)
    for ours, reference in zip(mine, alone, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    print(f"rank {rank} of {world_size}: 4 steps, the weights of one process", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks = torch.cuda.device_count()
    print(f"{ranks} GPUs")
    mp.spawn(worker, args=(ranks,), nprocs=ranks)
