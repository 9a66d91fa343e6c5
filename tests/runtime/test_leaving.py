"""A user's own DistributedDataParallel may live longer than the group it was made in."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import faulthandler

import torch
import torch.distributed as dist

import everyrank

faulthandler.dump_traceback_later(90, exit=True)


def train():
    with everyrank.join(backend="gloo", device="cpu"):
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.zeros(1, 2)).sum().backward()
        dist.all_gather_object([None], list(range(10)))
    return model


for _ in range(150):
    train()
"""


def test_a_model_that_outlives_its_group_does_not_hang() -> None:
    """Without the cure in leaving, torch 2.13 deadlocks within the first hundred rounds."""
    ended = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
