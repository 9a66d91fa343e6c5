"""Right, but unusual: two groups one after the other, other shapes with as many elements, traffic between two ranks."""

import time

import torch
import torch.distributed as dist

import everyrank

with everyrank.join():
    for _ in range(3):
        dist.all_reduce(torch.ones(3))
with everyrank.join() as world:
    if world.rank == 1:
        time.sleep(4)  # long enough that the others are asked whom they wait for
    for _ in range(3):
        dist.broadcast(torch.ones(7), 0)
    for _ in range(5):
        if world.rank == 0:
            dist.send(torch.ones(2), 1)
        elif world.rank == 1:
            dist.recv(torch.ones(2), 0)
            dist.send(torch.ones(1), 2)
        else:
            dist.recv(torch.ones(1), 1)
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
            dist.all_reduce(torch.ones(1), op=op)
    dist.all_reduce(torch.ones(4) if world.rank else torch.ones(2, 2))
    dist.broadcast(torch.tensor(1.0) if world.rank else torch.ones(1), 0)
print("right", flush=True)
