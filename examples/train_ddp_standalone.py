"""Train on several processes that this script starts itself: ``python examples/train_ddp_standalone.py``.

The configuration names what is defined here as ``!pyobject __main__.<name>``; spawned processes find it too.
"""

import argparse
from pathlib import Path

import torch
import torch.multiprocessing as mp
import yaml
from torch.nn.functional import cross_entropy

from everyrank import TrainerDDP, cleanup_ddp, get_loader, initialize_ddp
from everyrank.training.config import read_config

CONFIG = Path(__file__).parent.parent / "configs" / "train_ddp.yaml"


class SpiralNet(torch.nn.Sequential):
    """A small network that tells three spiral arms apart."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))


def spirals(num_samples: int = 1000) -> torch.utils.data.TensorDataset:
    """Return points of three spiral arms with noise, and the arm of each."""
    generator = torch.Generator().manual_seed(0)
    arm = torch.randint(3, (num_samples,), generator=generator)
    radius = torch.rand(num_samples, generator=generator).sqrt()
    angle = 2.5 * radius + arm * 2 * torch.pi / 3 + 0.2 * torch.randn(num_samples, generator=generator)
    return torch.utils.data.TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


def compute_loss(output: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean loss over the samples of the batch."""
    return cross_entropy(output, data[1])


def accuracy(output: torch.Tensor, data: list[torch.Tensor]) -> torch.Tensor:
    """Return the fraction of the batch that is told right."""
    return (output.argmax(dim=1) == data[1]).float().mean()


def train_ddp(rank: int, world_size: int, config: dict, master_addr: str, master_port: str) -> None:
    """Train on one rank; all ranks run this."""
    initialize_ddp(rank, world_size, master_addr=master_addr, master_port=master_port)
    try:
        trainer = TrainerDDP(rank=rank, config=config)
        train_loader, val_loader, test_loader = trainer.prepare_dataloaders(spirals(), split=[0.8, 0.1, 0.1])
        trainer.run_training(train_loader, val_loader)
        trainer.run_test(test_loader)
    finally:
        cleanup_ddp()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--path", help="the run's folder, instead of training.path")
    parser.add_argument("--world-size", type=int, help="number of processes, instead of parallel.world_size")
    parser.add_argument("--master-port", help="instead of parallel.master_port")
    arguments = parser.parse_args()

    with open(arguments.config) as file:
        config = yaml.load(file, Loader=get_loader())
    if arguments.path:
        config["training"]["path"] = arguments.path
    if arguments.world_size:
        config["parallel"]["world_size"] = arguments.world_size
    read_config(config)  # says every mistake at once, before a process is started
    world_size = config["parallel"]["world_size"]
    port = arguments.master_port or config["parallel"]["master_port"]
    mp.spawn(train_ddp, args=(world_size, config, config["parallel"]["master_addr"], port), nprocs=world_size)
