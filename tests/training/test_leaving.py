"""A trainer may live longer than its process group."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import dataclasses
import faulthandler

import torch
import torch.distributed as dist

import everyrank
from everyrank.training.parallel.config import ParallelConfig
from everyrank.training.parallel.wrapping import wrap

faulthandler.dump_traceback_later(60, exit=True)


def train():
    with everyrank.join(backend="gloo", device="cpu") as world:
        # DDP is only put around a model where there are several ranks; what is tested needs no second one.
        two = dataclasses.replace(world, environment=dataclasses.replace(world.environment, world_size=2))
        model = wrap(torch.nn.Linear(2, 2), ParallelConfig(), two, world.device)
        model(torch.zeros(1, 2)).sum().backward()
        dist.all_gather_object([None], list(range(10)))
    return model


for _ in range(300):
    train()
"""


def test_a_model_that_outlives_its_group_does_not_hang() -> None:
    """Without the cure in ``wrap`` this hangs within the first hundred rounds: gloo threads and the reducer's
    destructor wait for each other (torch 2.13)."""
    ended = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
