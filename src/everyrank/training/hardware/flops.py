"""How much of a GPU's arithmetic a run uses: counted operations, measured time, and the maker's figure for the device.

Model FLOPs utilisation (MFU) is the operations of the forward and backward passes that were counted, per second, over
what the devices could do at best (arXiv:2204.02311, appendix B; operations that are computed twice count once).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from everyrank.runtime.collectives import gather_objects
from everyrank.runtime.world import World
from everyrank.training.config import TrainingConfig

# Dense operations per second: of bfloat16 (float16 where a device has none), of TF32, of float32 without TF32; None
# where a device has no such unit. The makers' data sheets give twice as much for the first two, where weights are
# sparse: NVIDIA A10 (2021), A100 (2021), H100 (2023), H200 (2024), L4 (2023), L40S (2023), T4 (2019), V100 (2018).
PEAKS: tuple[tuple[str, tuple[float, float | None, float]], ...] = (
    (r"\bH200\b", (989e12, 494e12, 67e12)),
    (r"\bH100 PCIe\b", (756e12, 378e12, 51e12)),
    (r"\bH100 NVL\b", (835e12, 417e12, 60e12)),
    (r"\bH100\b.*\bHBM3\b", (989e12, 494e12, 67e12)),
    (r"\bA100\b", (312e12, 156e12, 19.5e12)),
    (r"\bA10\b", (125e12, 62.5e12, 31.2e12)),
    (r"\bL40S\b", (362e12, 183e12, 91.6e12)),
    (r"\bL4\b", (121e12, 60e12, 30.3e12)),
    (r"\bV100-SXM2\b", (125e12, None, 15.7e12)),
    (r"\bT4\b", (65e12, None, 8.1e12)),
)


def peak_flops(name: str, kind: str) -> float | None:
    """Return the most operations per second of a device, or None where that is not known.

    Args:
        name: What ``torch.cuda.get_device_name`` gives.
        kind: ``half``, ``tf32`` or ``float32``.
    """
    for pattern, (half, tf32, float32) in PEAKS:
        if re.search(pattern, name):
            return {"half": half, "tf32": tf32 or float32, "float32": float32}.get(kind)
    return None


def kind_of_arithmetic(config: TrainingConfig) -> str:
    """Return which of a device's figures a training is measured by."""
    if config.mixed_precision is not None or config.dtype == "bfloat16":
        return "half"
    if config.dtype == "float64":
        return "float64"
    return "tf32" if config.tf32 else "float32"


class FlopCount:
    """Counts the operations of a run's first step, forward and backward, and makes figures of them.

    Attributes:
        flops: Operations of this rank's part of the step; None before it.
        num_samples: Samples in that part.
    """

    def __init__(self) -> None:
        self.flops: int | None = None
        self.num_samples = 0
        self._is_new = True

    def is_new(self) -> bool:
        """Whether the counted step is among those since the last call."""
        is_new, self._is_new = self._is_new, False
        return is_new

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in the block. What is compiled runs uncompiled there: its kernels have no formula."""
        from torch.utils.flop_counter import FlopCounterMode

        with _uncompiled(), FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def figures(self, config: TrainingConfig, world: World, num_samples: int, seconds: float) -> dict[str, float]:
        """Return ``samples_per_s``, ``tflops_per_s`` of all ranks, and ``mfu`` where the devices are known. Collective.

        Args:
            config: The ``training`` section.
            world: The joined world.
            num_samples: Samples that all ranks trained on together.
            seconds: How long they took.
        """
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        found = gather_objects((self.flops or 0, self.num_samples, peak_flops(device, kind_of_arithmetic(config))))
        flops, samples = sum(one[0] for one in found), sum(one[1] for one in found)
        if not flops or not samples or seconds <= 0:
            return {}
        speed = num_samples / seconds
        figures = {"samples_per_s": speed, "tflops_per_s": speed * flops / samples / 1e12}
        peaks = [one[2] for one in found if one[2] is not None]
        if len(peaks) == len(found):
            figures["mfu"] = figures["tflops_per_s"] * 1e12 / sum(peaks)
        return figures


def _uncompiled() -> AbstractContextManager[object]:
    """What is compiled runs as it is written. Nothing is, as long as nobody has imported the compiler; nor do we."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
