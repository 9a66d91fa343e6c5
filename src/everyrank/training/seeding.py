"""Random numbers: the same initial weights everywhere, each rank's own randomness afterwards, and their state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

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


def capture_rng(device: torch.device) -> dict[str, Any]:
    """Return the state of this rank's generators as plain values and arrays."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state().numpy(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy()
    return state


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on with the generators that ``capture_rng`` saved."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.from_numpy(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda"]), device)
