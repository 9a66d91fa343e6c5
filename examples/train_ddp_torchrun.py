"""Train on the processes a launcher has started.

::

    torchrun --standalone --nproc_per_node=2 examples/train_ddp_torchrun.py
    python -m torch.distributed.launch --nproc_per_node=2 examples/train_ddp_torchrun.py

Plain ``python examples/train_ddp_torchrun.py`` trains in one process.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml
from train_ddp_standalone import CONFIG, SpiralNet, accuracy, compute_loss, spirals

from everyrank import TrainerDDP, cleanup_ddp, get_loader, initialize_ddp
from everyrank.errors import Preempted

__all__ = ["SpiralNet", "accuracy", "compute_loss"]  # named by the configuration as __main__.<name>


def main() -> None:
    """Join, train, test, leave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--path", help="the run's folder, instead of training.path")
    parser.add_argument("--local-rank", "--local_rank", type=int, help="passed by torch.distributed.launch")
    arguments = parser.parse_args()

    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    initialize_ddp(rank, world_size)
    try:
        with open(arguments.config) as file:
            config = yaml.load(file, Loader=get_loader())
        if arguments.path:
            config["training"]["path"] = arguments.path
        trainer = TrainerDDP(rank=rank, config=config)
        train_loader, val_loader, test_loader = trainer.prepare_dataloaders(spirals(), split=[0.8, 0.1, 0.1])
        trainer.run_training(train_loader, val_loader)
        trainer.run_test(test_loader)
    finally:
        cleanup_ddp()


if __name__ == "__main__":
    try:
        main()
    except Preempted as stopped:  # a signal came; a checkpoint is saved, and the same command goes on from it
        sys.exit(stopped.exit_code)
