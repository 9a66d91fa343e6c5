"""Distributed training as it was written for torch.distributed.launch."""

import argparse
import json
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def init_distributed(args):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group(backend="nccl", init_method="env://")
    args.rank = int(os.environ["RANK"])
    args.world_size = int(os.environ["WORLD_SIZE"])
    num_gpus = torch.cuda.device_count()
    args.device = torch.device(f"cuda:{args.rank % num_gpus}" if torch.cuda.is_available() else "cpu")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", default=".")
    args = parser.parse_args()
    init_distributed(args)
    torch.manual_seed(0)
    inputs = torch.linspace(-1, 1, 32).reshape(-1, 1)
    dataset = TensorDataset(inputs, inputs**2)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, sampler=sampler)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(args.device)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    orders = []
    for epoch in range(args.epochs):  # noqa: B007
        order = []
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x.to(args.device)), y.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            order += x.flatten().tolist()
        orders.append(order)
    if args.rank == 0:
        with open(os.path.join(args.out, "result.json"), "w") as file:
            json.dump({"world_size": args.world_size, "local_rank": args.local_rank, "orders": orders}, file)


if __name__ == "__main__":
    main()
