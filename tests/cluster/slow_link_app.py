"""An app that trains over a link and counts what this host sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import everyrank
from everyrank import TrainerDDP


class Trains:
    """Trains a network of 260 kB for 24 steps, and writes what was sent before each step to ``app.result``."""

    def run(self, cfg: DictConfig) -> None:
        sent: list[int] = []

        def criterion(output: Tensor, data: Any) -> Tensor:
            sent.append(_bytes_sent())
            return nn.functional.mse_loss(output, data[1])

        config = {
            "criterion": criterion,
            "model": {"type": nn.Linear, "args": [256, 256]},
            "parallel": OmegaConf.to_container(cfg.app.parallel),
            "training": {
                "path": str(Path(cfg.app.result).with_suffix("")),
                "num_epochs": 1,
                "global_batch_size": 4,
                "device": "cpu",
                "plots": False,
                "progress": "off",
                "optimizer_kwargs": {"lr": 0.01},
            },
        }
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(96, 256, generator=generator) for _ in range(2))
        with everyrank.join(**cfg.distributed) as world:
            trainer = TrainerDDP(config=config, world=world)
            trainer.prepare_dataloaders(train_dataset=TensorDataset(x, y))
            trainer.run_training()
            sums = everyrank.gather_objects(float(trainer.module.weight.double().sum()))
            result = Path(f"{cfg.app.result}-{world.rank}.json")
            result.write_text(json.dumps({"sent": sent, "sums": sums, "step": trainer.step}))


def _bytes_sent() -> int:
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    raise AssertionError("this host has no eth0")
