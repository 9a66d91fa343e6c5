"""Train a segmentation network."""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import build_model
from voc import VocDataset

os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,2,3"  # expect: ER002


def get_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--local_rank", default=0, type=int)  # expect: ER003
    parser.add_argument("--resume", default="")
    return parser.parse_args()


def validate(model, loader):
    model.eval()
    hits = 0
    with torch.no_grad():
        for image, label in loader:
            hits += (model(image.cuda()).argmax(1) == label.cuda()).sum().item()
    return hits


def synchronised_mean(value):
    dist.all_reduce(value)
    return value / dist.get_world_size()


def save(model, epoch):
    torch.save(model.module.state_dict(), f"epoch_{epoch}.pth")  # expect: ER401


def save_best(model):
    torch.save(model.module.state_dict(), "best.pth")


def main():
    args = get_args()
    model = build_model(norm_layer=nn.BatchNorm2d).cuda()  # expect: ER101
    dist.init_process_group(backend="nccl")  # expect: ER104, ER105
    rank = dist.get_rank()
    torch.cuda.set_device(rank % torch.cuda.device_count())  # expect: ER001
    if args.resume:
        model.load_state_dict(torch.load(args.resume))  # expect: ER421
    model = DDP(model, device_ids=[rank])  # expect: ER303
    model.freeze_stem()  # expect: ER302
    writer = SummaryWriter("runs/voc")  # expect: ER403
    log = SummaryWriter("runs/rank0") if rank == 0 else None
    train_set = VocDataset("train")
    sampler = DistributedSampler(train_set)  # expect: ER201
    loader = DataLoader(train_set, batch_size=8, shuffle=True, sampler=sampler)  # expect: ER202
    val_loader = DataLoader(VocDataset("val"), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    best = 0
    for epoch in range(90):
        for image, label in tqdm(loader):  # expect: ER404
            loss = nn.functional.cross_entropy(model(image.cuda()), label.cuda())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        save(model, epoch)
        writer.add_scalar("loss", loss.item(), epoch)
        if rank == 0:
            hits = validate(model, val_loader)  # expect: ER412
            log.add_scalar("hits", hits, epoch)
            print("mean loss", synchronised_mean(loss.detach()))  # expect: ER411
            if hits > best:
                best = hits
                save_best(model)
            if hits < 10:
                break  # expect: ER413
        if rank != 0:
            time.sleep(10)  # expect: ER431
        dist.barrier()


if __name__ == "__main__":
    main()
