"""Training by TrainerDDP, and one of many faults in one rank at one step: see ``faulty_program.py``.

``python faulty_trainer.py KIND RANK STEP [FOLDER]``: the trainer's folder is a temporary one if none is given.
"""

import sys
import tempfile
import time
from typing import Any

import torch
from faulty_program import Samples, misbehave, stamp
from torch import nn

import everyrank


class Criterion:
    """The mean square; at one step of one rank, a fault."""

    def __init__(self, kind: str, guilty: int, step: int) -> None:
        self.kind, self.guilty, self.step, self.calls = kind, guilty, step, 0

    def __call__(self, output: torch.Tensor, data: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.step and torch.distributed.get_rank() == self.guilty:
            stamp()
            misbehave(self.kind, output.detach().mean())
        return output.square().mean()


def main() -> None:
    """Train; at one step, in one rank, go wrong."""
    kind, guilty, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with everyrank.join() as world, tempfile.TemporaryDirectory(dir=".") as folder:
        in_data = kind in ("stuck_loader", "raising_loader", "killed_worker", "slow_loader")
        config = {
            "criterion": Criterion(kind, guilty, step),
            "model": {"type": nn.Linear, "args": [8, 1]},
            "training": {
                **{
                    "path": sys.argv[4] if len(sys.argv) > 4 else folder,
                    "num_epochs": 1,
                    "batch_size": 1,
                    "device": "cpu",
                    "progress": "off",
                },
                **{"num_workers": int(in_data and kind != "slow_loader"), "plots": False},
            },
            "parallel": {},
        }
        trainer = everyrank.TrainerDDP(config=config, world=world)
        bad = 4 * step if world.rank == guilty else -1
        data = BadFor(kind, bad) if in_data else Samples("", -1)
        trainer.prepare_dataloaders(train_dataset=data, val_dataset=Samples("", -1))
        trainer.run_training()


class BadFor(Samples):
    """The first sample that this rank gets from ``bad`` on is bad: which those are is the sampler's."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.kind == "slow_loader" and self.bad >= 0:
            time.sleep(0.05)
        return super().__getitem__(self.bad if self.bad >= 0 and index >= self.bad else index)


if __name__ == "__main__":
    main()
