"""A distributed program as it should be: no finding."""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import Net, Words


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def get_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", "--local-rank", type=int, default=int(os.environ.get("LOCAL_RANK", 0)))
    parser.add_argument("--resume")
    return parser.parse_args()


def setup(args):
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if torch.cuda.is_available():
        torch.cuda.set_device(args.local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def mean(value):
    dist.all_reduce(value)
    return value / dist.get_world_size()


def save(model, path):
    if not is_main_process():
        return
    torch.save(model.module.state_dict(), path)


def download(path):
    if dist.get_rank() != 0:
        dist.barrier()
    data = Words(path, download=True)
    if dist.get_rank() == 0:
        dist.barrier()
    return data


def gather_on_rank_0(tensor):
    if dist.get_rank() == 0:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.gather(tensor, parts)
        return parts
    dist.gather(tensor)
    return None


def main():
    args = get_args()
    setup(args)
    device = torch.device("cuda", args.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    model = Net().to(device)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, map_location="cpu", weights_only=True))
    model = DDP(model)
    writer = SummaryWriter("runs") if is_main_process() else None
    data = download("data")
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=8 // dist.get_world_size(), sampler=sampler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(10):
        sampler.set_epoch(epoch)
        for batch in tqdm(loader, disable=not is_main_process()):
            loss = model(batch.to(device)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        average = mean(loss.detach())
        if writer is not None:
            writer.add_scalar("loss", average.item(), epoch)
        stop = torch.tensor(float(average < 0.1), device=device)
        dist.broadcast(stop, src=0)
        if stop:
            break
        torch.save(optimizer.state_dict(), f"optimizer_{dist.get_rank()}.pt")
        save(model, "model.pt")
    gather_on_rank_0(average)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
