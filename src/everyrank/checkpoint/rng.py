"""The random generators of a process as plain values, so that a resumed rank draws what it would have drawn."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture_rng(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of this process's generators: Python's, numpy's global one, torch's on the CPU and the GPU.

    The result is JSON-able, about 10 kB. The GPU's is left out if no GPU has been used, for it has no state yet; only
    one device's is taken, for a rank has one device.

    Args:
        device: The rank's device; the current GPU's state is taken if it is none or no GPU.
    """
    state: dict[str, Any] = {"torch": _pack(torch.get_rng_state())}
    version, internal, gauss_next = random.getstate()
    words = np.array(internal, dtype="<u4")
    state["python"] = [version, base64.b64encode(words.tobytes()).decode("ascii"), gauss_next]
    name, keys, position, has_gauss, cached = np.random.get_state()
    packed = base64.b64encode(np.asarray(keys, dtype="<u4").tobytes()).decode("ascii")
    state["numpy"] = [name, packed, int(position), int(has_gauss), float(cached)]
    if torch.cuda.is_initialized():
        state["cuda"] = _pack(torch.cuda.get_rng_state(_gpu(device)))
    return state


def restore_rng(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Set this process's generators to what ``capture_rng`` returned.

    A generator that the state does not hold, such as the GPU's when it was taken without one, is left as it is.
    """
    if "torch" in state:
        torch.set_rng_state(_unpack(state["torch"]))
    if "python" in state:
        version, packed, gauss_next = state["python"]
        words = np.frombuffer(base64.b64decode(packed), dtype="<u4")
        random.setstate((version, tuple(words.tolist()), gauss_next))
    if "numpy" in state:
        name, packed, position, has_gauss, cached = state["numpy"]
        keys = np.frombuffer(base64.b64decode(packed), dtype="<u4").astype(np.uint32)
        np.random.set_state((name, keys, position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unpack(state["cuda"]), _gpu(device))


def _gpu(device: torch.device | None) -> torch.device | str:
    return device if device is not None and device.type == "cuda" else "cuda"


def _pack(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
