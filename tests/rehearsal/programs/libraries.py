"""The same small training in Accelerate or in Lightning Fabric, which choose device and backend themselves."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def made():
    torch.manual_seed(4)
    inputs = torch.rand(32, 5)
    model = nn.Linear(5, 1)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)
    return model, torch.optim.SGD(model.parameters(), lr=0.2), loader


def with_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16")
    model, optimizer, loader = accelerator.prepare(*made())
    for _ in range(3):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = ((model(inputs) - targets) ** 2).mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return (
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        accelerator.gather(loss.detach()).mean(),
    )


def with_fabric():
    from lightning.fabric import Fabric

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(accelerator=kind, devices=2, strategy="ddp", precision="bf16-mixed")
    fabric.launch()
    model, optimizer, loader = made()
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    for _ in range(3):
        for inputs, targets in loader:
            loss = ((model(inputs) - targets) ** 2).mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return fabric.global_rank, fabric.world_size, fabric.device, fabric.all_gather(loss.detach()).mean()


if __name__ == "__main__":
    rank, world_size, device, loss = {"accelerate": with_accelerate, "fabric": with_fabric}[sys.argv[1]]()
    # One write: torchrun's ranks share a pipe, and print() would write the line's end by itself.
    sys.stdout.write(f"rank {rank} of {world_size} on {device}: 12 steps, loss {loss.item():.6f}\n")
    torch.distributed.destroy_process_group()
