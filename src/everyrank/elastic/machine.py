"""What this machine has, found without importing torch."""

from __future__ import annotations

import glob
import os
import sys

from everyrank.errors import DriverError, did_you_mean

_START_METHODS = ("forkserver", "spawn", "fork")


def num_cpus() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_gpus() -> int:
    """NVIDIA GPUs visible to this process: ``CUDA_VISIBLE_DEVICES`` if set, else those the driver lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(glob.glob("/proc/driver/nvidia/gpus/*")) or len(glob.glob("/dev/nvidia[0-9]*"))
    if visible is None:
        return present
    listed = [d for d in visible.split(",") if d.strip() and d.strip() != "-1"]
    return min(len(listed), present)


def resolve_nproc(value: int | str, name: str, device: str = "auto") -> int:
    """Turn ``nproc_per_node`` into a number.

    Args:
        value: A positive number, or ``auto`` (a process a GPU if there are any, else one a core), ``gpu``, ``cpu``.
        name: The key, for the message.
        device: The device that was asked for; with ``cuda`` more processes than GPUs are refused.

    Raises:
        DriverError: Not a positive number nor one of the words, or more processes than visible GPUs.
    """
    gpus = num_gpus()
    words = {"auto": gpus or num_cpus(), "gpu": gpus, "cpu": num_cpus()}
    text = str(value).strip().lower()
    if text in words:
        if words[text] == 0:
            raise DriverError(f"{name}={value} was set, but no GPU is visible here. Set a number, or {name}=cpu.")
        return words[text]
    try:
        number = int(text)
    except ValueError:
        raise DriverError(
            f"{name}={value!r} was set; it is a positive number, or one of auto, gpu, cpu.{did_you_mean(value, words)}"
        ) from None
    if number < 1:
        raise DriverError(f"{name}={value} was set, but a node runs at least one process. Set {name}=1 or more.")
    wants_gpus = device.startswith("cuda") or (device == "auto" and gpus > 0)
    if wants_gpus and number > gpus:
        raise DriverError(
            f"{name}={value} was set, but {gpus} GPUs are visible (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Set {name}={max(gpus, 1)} or fewer, "
            "or run on the CPU with distributed.device=cpu."
        )
    return number


def resolve_start_method(method: str | None, key: str) -> str:
    """Return a start method; None is ``forkserver`` where fork is safe (Linux), and ``spawn`` elsewhere.

    Raises:
        DriverError: It is none of those there are.
    """
    if method is None:
        method = "forkserver" if sys.platform.startswith("linux") else "spawn"
    if method not in _START_METHODS:
        raise DriverError(
            f"{key}={method} was set; it is one of {', '.join(_START_METHODS)}.{did_you_mean(method, _START_METHODS)}"
        )
    return method
