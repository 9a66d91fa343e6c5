"""One optimizer step: forward, loss weighted by this rank's share, backward, update. Nothing here waits for the device.

A rank's loss is scaled by ``num_local * world_size / num_global``. DDP averages gradients over the ranks, so the sum
over ranks of ``(num_local / num_global) * (gradient of the rank's mean loss)`` remains: the gradient of the mean loss
over the global batch, as one process would compute it. With accumulation, ``num_global`` counts the samples of all the
global batches of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from everyrank.checkpoint.rng import capture_rng, restore_rng
from everyrank.errors import ConfigError
from everyrank.training.batch import make_apply
from everyrank.training.config import TrainerConfig
from everyrank.training.decisions.criterion import look_at_criterion
from everyrank.training.hardware.feeding import Feed
from everyrank.training.hardware.flops import FlopCount
from everyrank.training.parallel.wrapping import recording, records_its_graph, without_sync
from everyrank.training.parts import Parts
from everyrank.training.saving.finite import FiniteWeights

AUTOCAST = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {None: None, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class TrainStep:
    """Takes optimizer steps.

    Args:
        parts: What the run is made of.
        criterion: ``(output, data)`` to the mean loss over the samples of the batch.
        config: The whole configuration.
        device: Where the model is.

    Attributes:
        feed: Makes a loader's batches ready for the step.
        flops: The count of the first step's operations, or None.
    """

    def __init__(
        self, parts: Parts, criterion: Callable[[Any, Any], Tensor], config: TrainerConfig, device: torch.device
    ) -> None:
        self.local, self.frozen, self.ema, self.scaler = parts.local, parts.frozen, parts.ema, parts.scaler
        self.model, self.module, self.optimizer = parts.model, parts.module, parts.optimizer
        self.scheduler = parts.scheduler if parts.steps_scheduler else None
        training = config.training
        self.criterion, self.apply_model, self.config, self.device = criterion, config.apply_model, training, device
        self._num_steps = 0  # that the optimizer was told to take; counted with a scaler only
        if self.scaler is not None:
            self.optimizer.register_step_post_hook(self._count_step)
        self.skipped = False  # whether the last step left the weights as they were
        self.finite = FiniteWeights(self.module, self.ema, training.nan_policy)
        self._statistics: list[tuple[Tensor, Tensor]] = []  # what to put back if the step is skipped
        # optimizer.zero_grad() is a loop over the parameters inside several microseconds of profiling.
        self._zero_grad = (
            self._drop_gradients
            if type(self.optimizer).zero_grad is torch.optim.Optimizer.zero_grad
            else self.optimizer.zero_grad
        )
        self.feed = Feed(device, DTYPES[training.dtype], training.channels_last)
        self._move = self.feed.move
        self.flops = FlopCount() if training.count_flops else None
        self._autocast = AUTOCAST[training.mixed_precision]
        clips = training.clip_grad_norm or training.clip_grad_value
        own_ways = (training.mixed_precision, clips, training.nan_policy == "skip")
        self._is_plain = not any((*own_ways, self.scheduler, self.ema, self._move, self.local, self.frozen))
        self._checked = self._looked = False

    def __call__(self, batches: Iterator[Any], weights: Sequence[float]) -> Tensor:
        """Take one optimizer step.

        Args:
            batches: Where the next batches come from (see ``feed``); one is taken for each weight.
            weights: For each batch ``num_local * world_size / num_global``.

        Returns:
            This rank's weighted loss, a scalar on the device: its mean over ranks is the loss of the step's samples.
        """
        if not self._checked:
            return self._first(batches, weights)
        if self._is_plain and len(weights) == 1:
            data = next(batches)
            loss = self.criterion(self.apply_model(self.model, data), data)  # type: ignore[misc]
            if weights[0] != 1.0:
                loss = loss * weights[0]
            loss.backward()
            self.optimizer.step()
            self._zero_grad()
            return loss.detach()
        loss = self._accumulate(batches, weights)
        self._update()
        return loss

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters now: groups may be added while a model is thawed."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _drop_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _first(self, batches: Iterator[Any], weights: Sequence[float]) -> Tensor:
        """Take the first step, in which mistakes of form show."""
        data = next(batches)
        moved = self._move(data) if self._move else data
        guessed = self.apply_model is None
        if guessed:
            self.apply_model = make_apply(self.module, moved)
        try:
            if len(weights) > 1 and records_its_graph(self.model):
                self._record_graph(moved, weights[0])
            with self.flops.counting() if self.flops is not None else nullcontext():
                loss = self._accumulate(_Chain(data, batches), weights)
        except Exception as error:
            if guessed:
                error.add_note(
                    f"No apply_model is configured: for batches of type {type(data).__name__} the model is called with "
                    f"{'the first element' if isinstance(data, tuple | list) else 'the batch'}. If that is not what it "
                    "takes, set apply_model to a function (model, data) that returns the output."
                )
            raise
        self._checked = True
        self._update()
        return loss

    def _record_graph(self, data: Any, weight: float) -> None:
        """Let DDP record its static graph, which it cannot while gradients stay on the rank; leave no other trace."""
        kept = capture_rng(self.device)
        statistics = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        with recording(self.model):
            self._backward(data, weight)
        self._zero_grad()
        for statistic, before in statistics:
            statistic.copy_(before)
        restore_rng(kept, self.device)

    def _accumulate(self, batches: Iterator[Any], weights: Sequence[float]) -> Tensor:
        if self.config.nan_policy == "skip":
            self._statistics = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        total: Tensor | None = None
        for number, weight in enumerate(weights):
            data = next(batches)
            if self._move is not None:
                data = self._move(data)
            if number < len(weights) - 1:
                with without_sync(self.model):
                    loss = self._backward(data, weight)
            else:
                loss = self._backward(data, weight)
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _backward(self, data: Any, weight: float) -> Tensor:
        assert self.apply_model is not None
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            output = self.apply_model(self.model, data)
            loss = self.criterion(output, data)
            if not self._looked:
                self._looked = True
                look_at_criterion(self.criterion, output, data, loss, self.device)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(
                f"criterion returned {found}; it must return a scalar tensor, the mean loss over the samples of the "
                "batch. End it with .mean()."
            )
        loss = loss * weight
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        return loss.detach()

    def _update(self) -> None:
        config, local = self.config, self.local
        if local is not None:
            local.before_step(self._parameters)
        is_apart = local is not None and local.is_apart
        if self.frozen is not None and not self.frozen.drop_gradients():
            self.frozen = None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if config.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, config.clip_grad_norm)
        if config.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(self._parameters, config.clip_grad_value)
        is_done = self._step_optimizer()
        # A rank on its own cannot ask whether the others have skipped this step: learning rates go on all the same.
        if self.scheduler is not None and (is_done or is_apart):
            self.scheduler.step()
        if self.ema is not None and is_done and not is_apart:
            self.ema.update()
        if local is not None:
            local.after_step()
        self._zero_grad()

    def _step_optimizer(self) -> bool:
        """Step the optimizer unless the gradients forbid it; tell whether it was done."""
        if self.scaler is not None:
            self.skipped = self._step_scaled(self.scaler)
        else:
            self.skipped = self.config.nan_policy == "skip" and not self._gradients_are_finite()
            if not self.skipped:
                self.optimizer.step()
            else:
                for statistic, kept in self._statistics:  # a sample that is NaN is in them by now
                    statistic.copy_(kept)
        return not self.skipped

    def _step_scaled(self, scaler: torch.amp.GradScaler) -> bool:
        """Step the optimizer unless the scaled gradients overflowed; tell whether it was left out.

        The scaler asks the device once itself, and then steps the optimizer or does not: its hook tells which. Only an
        optimizer that is given the answer on the device (a fused one) needs to be asked for it again.
        """
        asks_again = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        before = scaler.get_scale() if asks_again else 0.0
        num_before = self._num_steps
        scaler.step(self.optimizer)
        scaler.update()
        return scaler.get_scale() < before if asks_again else self._num_steps == num_before

    def _count_step(self, *_: object) -> None:
        self._num_steps += 1

    def _gradients_are_finite(self) -> bool:
        # Gradients are the same on every rank by now, so every rank comes to the same answer without asking; with local
        # updates they are its own, and so is the answer.
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return bool(torch.isfinite(norm))


class _Chain(Iterator[Any]):
    """An iterator with one item put back."""

    def __init__(self, first: Any, rest: Iterator[Any]) -> None:
        self._first, self._rest = [first], rest

    def __next__(self) -> Any:
        return self._first.pop() if self._first else next(self._rest)


def step_by_results(scheduler: Any, config: TrainerConfig, values: Mapping[str, float], *, epoch_ended: bool) -> None:
    """Step a scheduler whose ``interval`` is ``epoch``; nothing for the others.

    ``ReduceLROnPlateau`` is given its metric where that is measured: after an epoch, or after a validation.

    Args:
        scheduler: The scheduler, or None.
        config: The whole configuration.
        values: The numbers of the epoch or validation.
        epoch_ended: Whether it was an epoch.

    Raises:
        ConfigError: If the metric that ``ReduceLROnPlateau`` is to be given is not among them.
    """
    section, validation = config.training.scheduler, config.validation
    if section is None or section.interval != "epoch":
        return
    is_of_validation = section.metric.startswith("val_")
    if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        if epoch_ended:
            scheduler.step()
    elif section.metric in values:
        if epoch_ended or is_of_validation:
            scheduler.step(values[section.metric])
    elif not is_of_validation or (validation.every == 1 and validation.every_n_steps is None):
        raise ConfigError(f"training.scheduler.metric is {section.metric!r}, but the run has {', '.join(values)}.")
