"""How the ranks share a global batch where they are not equally fast.

The gradient is that of the whole batch whatever the shares are: each rank's loss is weighted by its samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import ConfigError
from everyrank.runtime.collectives import gather_objects
from everyrank.runtime.logs import get_logger
from everyrank.runtime.world import World
from everyrank.training.config import TrainerConfig
from everyrank.training.parallel.config import ParallelConfig
from everyrank.training.parts import Parts

logger = get_logger("training")

_WARM_UP_STEPS = 2  # of the first epoch: memory is taken and algorithms are chosen in them
_MEASURED_STEPS = 16  # of each epoch
_LEAST_CHANGE = 0.05  # of a rank's share; less is the noise of the measurement


def given_shares(config: ParallelConfig | None, world_size: int) -> list[float] | None:
    """Return the configured numbers, or None where the ranks share evenly (or are measured first).

    Args:
        config: The ``parallel`` section.
        world_size: Number of processes of the run.

    Raises:
        ConfigError: There is not one number for each rank.
    """
    if config is None or not isinstance(config.shares, list):
        return None
    if len(config.shares) != world_size:
        raise ConfigError(
            f"parallel.shares is {config.shares}, which is for {len(config.shares)} ranks, but the run has "
            f"{world_size}. Fix: give {world_size} numbers, or set it to measured or even."
        )
    return list(config.shares)


def is_measured(config: ParallelConfig | None, world: World) -> bool:
    """Whether the ranks share batches by their speed."""
    return world.is_distributed and config is not None and config.shares == "measured"


class SpeedMeter:
    """Measures this rank's time per sample in the forward passes of each epoch's first steps.

    A forward pass of the bare model waits for no other rank, and the backward pass takes as much longer on each. The
    hooks that measure are taken out after these steps. On CUDA the device's own clock is used, and read at the end of
    the epoch only.

    Args:
        module: The bare model.
        optimizer: Its steps are counted.
        sampler: The training sampler, whose shares are changed.
        device: Where the model is.
        accumulation_steps: Batches per step.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        sampler: GlobalBatchSampler,
        device: torch.device,
        accumulation_steps: int,
    ) -> None:
        self._module, self._optimizer, self._sampler, self._device = module, optimizer, sampler, device
        self._every, self._warm_up = accumulation_steps, _WARM_UP_STEPS
        self._marks: list[Any] = []
        self._handles: list[Any] = []
        self._batches = range(0)

    @classmethod
    @contextmanager
    def of(
        cls, config: TrainerConfig, parts: Parts, sampler: GlobalBatchSampler, device: torch.device, world: World
    ) -> Iterator[SpeedMeter | None]:
        """Measure inside of the block, from the cursor on; None where nobody has asked for it."""
        if not is_measured(config.parallel, world):
            yield None
            return
        meter = cls(parts.module, parts.optimizer, sampler, device, config.training.accumulation_steps)
        meter.start()
        try:
            yield meter
        finally:
            meter.stop()

    def start(self) -> None:
        """Measure from the cursor on."""
        self.stop()
        self._marks = []
        first = self._sampler.next_batch + self._warm_up * self._every
        self._batches = range(first, min(first + _MEASURED_STEPS * self._every, len(self._sampler)))
        self._skip, self._left, self._warm_up = self._warm_up, _MEASURED_STEPS, 0
        self._handles = [
            self._module.register_forward_pre_hook(self._mark),
            self._module.register_forward_hook(self._mark),
            self._optimizer.register_step_post_hook(self._count),
        ]

    def stop(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _mark(self, *_: object) -> None:
        if self._skip or not self._module.training:
            return
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _count(self, *_: object) -> None:
        if self._skip:
            self._skip -= 1
            return
        self._left -= 1
        if self._left == 0:
            self.stop()

    def seconds_per_sample(self) -> float | None:
        """What was measured since ``start``; None if this rank had no sample. Waits for the device."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=False))
        counts = [self._sampler.share(batch).num_local for batch in self._batches]
        if not pairs or not all(counts) or len(pairs) % len(counts):
            return None
        if self._device.type == "cuda":
            pairs[-1][1].synchronize()
            seconds = [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        else:
            seconds = [end - begin for begin, end in pairs]
        passes = len(pairs) // len(counts)  # a batch may go through the model more than once
        of_batches = [sum(seconds[n * passes : (n + 1) * passes]) / count for n, count in enumerate(counts)]
        return statistics.median(of_batches)  # a rank that was interrupted once is not slow

    def new_epoch(self, world: World) -> None:
        """Share the batches of the epoch that begins by what was measured in the last. Collective."""
        found = gather_objects(self.seconds_per_sample())
        self.stop()
        if all(found):
            shares = shares_of_speeds([1 / seconds for seconds in found if seconds], self._sampler.global_batch_size)
            if worth_it(self._sampler.shares or [1.0] * world.world_size, shares):
                self._sampler.set_shares(shares)
                if world.is_main:
                    text = ", ".join(f"rank {rank}: {share:.0%}" for rank, share in enumerate(shares))
                    logger.info("each rank's part of a global batch, by its measured speed: %s", text)
        self.start()


def shares_of_speeds(speeds: Sequence[float], global_batch_size: int) -> list[float]:
    """Return each rank's part of the whole, large enough for a sample of a batch if there are as many.

    A rank without one could not be measured again.
    """
    least = min(1.5 / global_batch_size, 1 / len(speeds))
    parts = [max(speed / sum(speeds), least) for speed in speeds]
    return [round(part / sum(parts), 4) for part in parts]


def worth_it(old: Sequence[float], new: Sequence[float]) -> bool:
    """Tell whether some rank's part changes by more than the measurement's noise."""
    pairs = [(one / sum(old), other / sum(new)) for one, other in zip(old, new, strict=True)]
    return min(new) > 0 and any(abs(other - one) > _LEAST_CHANGE * one for one, other in pairs)
