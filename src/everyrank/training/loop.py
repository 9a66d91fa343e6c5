"""An epoch's optimizer steps, and the moments between them at which the ranks look up and compare notes.

A step itself does nothing but train. What costs a collective, a wait for the device or a file (losses of all ranks,
finiteness, history, progress, the cursor, signals) happens at *sync points*: every half second or so, and wherever a
checkpoint or a validation is due; with local updates, where the ranks synchronize. Rank 0 measures how long steps take;
its measurement travels with the losses, so that all ranks place the next sync point at the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import NonFiniteLossError
from everyrank.runtime.collectives import gather_objects, reduce_sum
from everyrank.runtime.logs import get_logger
from everyrank.runtime.world import World
from everyrank.training.config import TrainingConfig
from everyrank.training.failures import describe_samples, explain
from everyrank.training.loaders import sampler_of
from everyrank.training.saving.ledger import Ledger
from everyrank.training.step import TrainStep
from everyrank.training.tracking.history import History
from everyrank.training.tracking.rank_seconds import LEAST_S, TimedBatches, rank_seconds

logger = get_logger("training")

_SYNC_EVERY_S = 0.5
_MAX_STEPS_BETWEEN_SYNCS = 1024

LossRow = tuple[int, float, float | None]
"""Step, mean loss of its samples, learning rate; the newest loss, which is only shown, has no rate."""


@dataclass
class Position:
    """Where a run is.

    Attributes:
        epoch: The current epoch, from 0.
        step: Optimizer steps done.
        loss_sum: Sum over this epoch's samples so far of their loss.
        num_samples: Number of those samples.
        num_skipped: Steps of the run that left the weights as they were.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    num_samples: int = 0
    num_skipped: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean loss over this epoch's samples so far."""
        return self.loss_sum / self.num_samples if self.num_samples else math.nan


@dataclass
class _Step:
    """What is remembered of a step until the next sync point."""

    number: int
    batches: range
    num_samples: int
    skipped: bool
    lr: float | None


@dataclass(kw_only=True)
class EpochLoop:
    """Trains epoch by epoch.

    Attributes:
        step: Takes one optimizer step.
        world: The joined world.
        config: The ``training`` section.
        position: Where the run is; kept up to date at sync points (``step`` always).
        history: Where losses are recorded.
        ledger: Where samples are recorded, or None.
        stops: Each n-th step of these is a sync point.
        sync_every: Steps from one sync point to the next.
    """

    step: TrainStep
    world: World
    config: TrainingConfig
    position: Position
    history: History
    ledger: Ledger | None
    stops: Sequence[int]
    sync_every: int = 1
    _losses: list[torch.Tensor] = field(default_factory=list, init=False)
    _steps: list[_Step] = field(default_factory=list, init=False)
    _since_s: float = field(default=0.0, init=False)
    _trained_s: float = field(default=0.0, init=False)
    _timed: TimedBatches | None = field(default=None, init=False)
    _speed: tuple[int, float] = field(default=(0, 0.0), init=False)  # samples and seconds, with ``count_flops`` only

    def run(self, loader: Any) -> Iterator[list[LossRow]]:
        """Train from the sampler's cursor to the end of its epoch, or to the run's last step.

        Yields:
            At each sync point, on all ranks: the recorded losses since the last, and the newest one.
        """
        sampler = sampler_of(loader, "the training loader")
        try:
            yield from self._run(loader, sampler, sampler.next_batch, len(sampler))
        except NonFiniteLossError:
            raise
        except Exception as error:
            told = explain(error, self.world, self._where(sampler))
            if told is error:
                raise
            raise told from error

    def batches_from(self, sampler: GlobalBatchSampler, batch: int) -> range:
        """Return the batches of an epoch that are to be trained on if it goes on with ``batch``."""
        end, config = len(sampler), self.config
        if config.num_steps is not None:
            end = min(end, batch + config.accumulation_steps * (config.num_steps - self.position.step))
        return range(batch, end)

    def _run(self, loader: Any, sampler: GlobalBatchSampler, batch: int, num_batches: int) -> Iterator[list[LossRow]]:
        step, position, steps, losses = self.step, self.position, self._steps, self._losses
        every, log_every = self.config.accumulation_steps, self.config.log_every_steps
        rates = step.optimizer.param_groups[0]
        full_weights, full_count = sampler.loss_weights(range(every)) if every < num_batches else ([], 0)
        end = self.batches_from(sampler, batch).stop
        iterator = iter(loader)
        if self.world.world_size > 1:
            iterator = self._timed = TimedBatches(iterator)
        iterator = step.feed.of(loader, iterator)
        if step.flops is not None:
            self._speed = (0, 0.0)
            if step.flops.flops is None:
                first = range(batch, min(batch + every, num_batches))
                step.flops.num_samples = sum(max(1, sampler.share(number).num_local) for number in first)
        self._since_s, self._trained_s, next_sync = time.monotonic(), 0.0, self._next_sync()
        while batch < end:
            if batch + every < num_batches:
                weights, count, taken = full_weights, full_count, every
            else:
                taken = min(every, num_batches - batch)
                weights, count = sampler.loss_weights(range(batch, batch + taken))
            loss = step(iterator, weights)
            position.step = number = position.step + 1
            lr = rates["lr"] if number % log_every == 0 else None
            steps.append(_Step(number, range(batch, batch + taken), count, step.skipped, lr))
            losses.append(loss)
            batch += taken
            if number >= next_sync:
                yield self._synchronize(sampler)
                self._since_s, next_sync = time.monotonic(), self._next_sync()
        if losses:
            yield self._synchronize(sampler)

    def rank_seconds(self) -> dict[str, list[float]] | None:
        """Where the time of the epoch's steps went on each rank; None for one rank, and a short epoch. Collective."""
        if self._timed is None or self._trained_s < LEAST_S:
            return None
        return rank_seconds(self._trained_s, self._timed.seconds)

    def figures(self) -> dict[str, float]:
        """How fast the epoch was, with ``count_flops``; else nothing. Collective."""
        if self.step.flops is None:
            return {}
        return self.step.flops.figures(self.config, self.world, *self._speed)

    def _synchronize(self, sampler: GlobalBatchSampler) -> list[LossRow]:
        """Bring everything up to date with the steps taken since the last time. Collective."""
        steps, losses = list(self._steps), torch.stack(self._losses).double()
        elapsed_s = time.monotonic() - self._since_s if self.world.is_main else 0.0
        # With local updates each rank skips for itself; otherwise all have skipped the same steps.
        skips = [float(step.skipped) for step in steps] if self.step.local is not None else []
        flag = self.step.finite.flag().reshape(1).to(losses.device)
        shared = reduce_sum(torch.cat([losses, losses.new_tensor([elapsed_s, *skips]), flag])).tolist()
        means = [total / self.world.world_size for total in shared[: len(steps)]]
        if not all(math.isfinite(mean) for mean in means):
            self._not_finite(sampler, losses.tolist(), means)
        if shared.pop():
            self.step.finite.refuse(self.position.epoch, self.position.step, steps[0].number)
        rows: list[LossRow] = []
        num_skips = shared[len(steps) + 1 :] or [step.skipped for step in steps]
        for step, mean, num_skip in zip(steps, means, num_skips, strict=True):
            step.skipped = bool(num_skip)
            self._record(sampler, step, mean)
            if step.lr is not None:
                rows.append((step.number, mean, float(step.lr)))
                self.history.add_step(
                    {"step": step.number, "epoch": self.position.epoch, "loss": mean, "lr": float(step.lr)}
                )
        sampler.commit(sum(len(step.batches) for step in steps))
        self._losses.clear()
        self._steps.clear()
        self._trained_s += shared[len(steps)]
        if self.step.flops is not None and not self.step.flops.is_new():  # the step that is counted is no measure
            samples, seconds = self._speed
            self._speed = samples + sum(step.num_samples for step in steps), seconds + shared[len(steps)]
        wanted = int(_SYNC_EVERY_S / max(shared[len(steps)] / len(steps), 1e-9))
        self.sync_every = max(1, min(wanted, 2 * self.sync_every, _MAX_STEPS_BETWEEN_SYNCS))
        if self.step.local is not None and self.step.local.is_due(self.position.step):
            self.step.local.synchronize()
        return [*rows, (self.position.step, means[-1], None)]

    def _record(self, sampler: GlobalBatchSampler, step: _Step, mean: float) -> None:
        if step.skipped:
            self.position.num_skipped += 1
            if math.isfinite(mean):
                logger.warning(
                    "epoch %d, step %d: gradients not finite, step skipped", self.position.epoch, step.number
                )
        if math.isfinite(mean) or not step.skipped:
            self.position.loss_sum += mean * step.num_samples
            self.position.num_samples += step.num_samples
        if self.ledger is not None:
            self.ledger.add(step.number, self.position.epoch, sampler.local_samples(step.batches))

    def _next_sync(self) -> int:
        """Return the step of the next sync point, the same on all ranks."""
        step = self.position.step
        wanted = step + self.sync_every
        if self.step.local is not None:
            wanted = self.step.local.next_sync(step, wanted)
        return min([wanted, *(step - step % every + every for every in self.stops)])

    def _not_finite(self, sampler: GlobalBatchSampler, local: list[float], means: list[float]) -> None:
        """Stop, or say which rank, step and samples gave the losses that are not finite. Collective."""
        policy = self.config.nan_policy
        bad = [i for i, mean in enumerate(means) if not math.isfinite(mean)]
        # Once weights are not finite, every later loss is not: only the first tells something.
        for index in bad if policy == "skip" else bad[:1]:
            step = self._steps[index]
            mine = None if math.isfinite(local[index]) else (local[index], sampler.local_samples(step.batches))
            for rank, found in enumerate(gather_objects(mine)):
                if found is None:
                    continue
                message = (
                    f"loss is {found[0]} on rank {rank} at epoch {self.position.epoch}, step {step.number}, "
                    f"samples {describe_samples(found[1])}"
                )
                if policy == "stop":
                    raise NonFiniteLossError(
                        f"{message}. Look at these samples and the learning rate; training.nan_policy: skip leaves "
                        "such steps out.",
                        rank=rank,
                        epoch=self.position.epoch,
                        step=step.number,
                        samples=found[1],
                    )
                if self.world.is_main:
                    logger.warning("%s: %s", message, "step skipped" if policy == "skip" else "going on")

    def _where(self, sampler: GlobalBatchSampler) -> str:
        """Return epoch, step and this rank's samples of the step that is under way."""
        batch = self._steps[-1].batches.stop if self._steps else sampler.next_batch
        taken = min(self.config.accumulation_steps, len(sampler) - batch)
        where = f"epoch {self.position.epoch}, step {self.position.step + 1}"
        if taken < 1:
            return where
        samples = sampler.local_samples(range(batch, batch + taken))
        return f"{where}, samples {describe_samples(samples)}"
