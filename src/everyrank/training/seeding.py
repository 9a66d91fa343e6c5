"""Random numbers: the same initial weights everywhere, each rank's own randomness afterwards."""

from __future__ import annotations

import random

import numpy as np
import torch

_STREAM = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive ranks over the seeds


def seed_everywhere(seed: int) -> None:
    """Seed Python, numpy and torch alike on every rank, so that models built next are equal."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, rank: int, step: int = 0) -> None:
    """Seed this rank's own randomness (dropout and the like): different on every rank.

    Args:
        seed: The run's seed.
        rank: This process's rank.
        step: Optimizer step to go on from at another world size, so that no randomness is used twice.
    """
    mixed = (seed * 1_000_003 + (rank + 1) * _STREAM + step * 0xD1B54A32D192ED03) % 2**63
    seed_everywhere(mixed)
