"""The random generators of a process as plain values, so that a resumed rank draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture_rng(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of this process's generators: Python's, numpy's global one, torch's on the CPU and the GPU.

    The values are such as ``encode_json`` takes, about 10 kB. The GPU's is left out if no GPU has been used, for it has
    no state yet; only one device's is taken, for a rank has one device.

    Args:
        device: The rank's device; the current GPU's state is taken if it is none or no GPU.
    """
    version, words, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state().numpy(),
        "python": (version, np.array(words, dtype="<u4"), gauss_next),
        "numpy": np.random.get_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state(_gpu(device)).numpy()
    return state


def restore_rng(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Set this process's generators to what ``capture_rng`` returned.

    A generator that the state does not hold, such as the GPU's when it was taken without one, is left as it is.
    """
    if "torch" in state:
        torch.set_rng_state(torch.from_numpy(state["torch"]))
    if "python" in state:
        version, words, gauss_next = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss_next))
    if "numpy" in state:
        np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(state["cuda"]), _gpu(device))


def _gpu(device: torch.device | None) -> torch.device | str:
    return device if device is not None and device.type == "cuda" else "cuda"
