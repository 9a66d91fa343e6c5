"""Validation and test: every sample once, and the same numbers at every world size."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from everyrank.data.containers import is_graph
from everyrank.errors import ConfigError, DataError
from everyrank.runtime.collectives import all_here, broadcast_decision, reduce_sum
from everyrank.runtime.handover import Handover
from everyrank.runtime.logs import get_logger
from everyrank.runtime.process_group import current_world
from everyrank.runtime.world import World
from everyrank.training.batch import is_there, make_apply, place_criterion, sample_losses, vectorised_losses
from everyrank.training.evaluation.metrics import MetricSet
from everyrank.training.failures import describe_samples
from everyrank.training.hardware.feeding import Feed
from everyrank.training.loaders import sampler_of

logger = get_logger("training")

# How long the other ranks wait for rank 0 where it evaluates alone: longer than any evaluation, shorter than for ever.
_WAIT = timedelta(days=7)
# Relative difference between a batch's loss and the mean of its samples' from which on the criterion is no such mean.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        loss: Mean loss over all samples.
        loss_std: Standard deviation of the loss over all samples.
        num_samples: Number of samples, over all ranks.
        metrics: The further metrics by name.
        std_over: ``"samples"``, or ``"batches"`` where a batch could not be taken apart.
    """

    loss: float
    loss_std: float
    num_samples: int
    metrics: dict[str, float] = field(default_factory=dict)
    std_over: Literal["samples", "batches"] = "samples"

    def as_dict(self) -> dict[str, float]:
        """Return all numbers by name."""
        return {"loss": self.loss, "loss_std": self.loss_std, "num_samples": self.num_samples, **self.metrics}


class DefaultValidator:
    """Evaluates a model on a loader; subclass it to change what is computed or how it is reported.

    Override ``compute_batch`` for other outputs or losses, and ``report`` for other words.

    Args:
        criterion: ``(output, data)`` to the mean loss over the samples of the batch. A module with buffers or
            parameters elsewhere than on ``device`` is copied there.
        device: Where to evaluate; by default the world's device.
        world: The joined world; by default the current one.
        apply_model: ``(model, data)`` to the output; by default see ``everyrank.training.batch.make_apply``.
        metrics: Further metrics: torchmetrics objects or classes, or functions ``(output, data)`` to the mean over
            the batch.
        on: ``"all"``: each rank evaluates its share. ``"rank0"``: rank 0 evaluates everything, the others wait.
        dtype: Type that floating-point tensors of the batches are cast to; None leaves them.
        autocast: A type for mixed precision, or None.
        channels_last: Whether four-dimensional tensors of the batches are laid out with channels last.
    """

    name = "Validation"

    def __init__(
        self,
        criterion: Callable[[Any, Any], Tensor],
        device: str | torch.device | None = None,
        *,
        world: World | None = None,
        apply_model: Callable[[nn.Module, Any], Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        on: Literal["all", "rank0"] = "all",
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        self.world = world if world is not None else current_world()
        self.device = torch.device(device) if device is not None else self.world.device
        self.criterion = place_criterion(criterion, self.device, dtype, in_place=False)
        self.apply_model = apply_model
        self.on = on
        self.metrics = MetricSet(metrics or {}, self.device)
        self.result: EvaluationResult | None = None
        self.batch = 0  # the batch that is loaded or evaluated, for messages
        self.step = 0  # optimizer steps that the model has done, where a trainer evaluates it
        self._autocast = autocast
        self._feed = Feed(self.device, dtype, channels_last)
        self._vectorised = True
        self._group: Any = None
        self._handover: Handover | None = None
        if on == "rank0" and self.world.is_distributed:
            self._prepare_rank_zero()

    def _prepare_rank_zero(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_WAIT)

    def evaluate(
        self, model: nn.Module, loader: Any, between_batches: Callable[[], None] | None = None
    ) -> EvaluationResult:
        """Evaluate ``model`` on every sample of ``loader``. Collective; all ranks get the same result.

        Args:
            model: The bare model, not its DDP wrapper.
            loader: A loader over global batches, as ``prepare_dataloaders`` makes.
            between_batches: Called after each batch, where every rank evaluates.
        """
        if self.world.is_distributed:
            all_here(self.name.lower(), self.world)
        if self.on == "rank0" and self.world.is_distributed:
            local = self._evaluate_local(model, loader, None, reduce=False) if self.world.is_main else None
            shared = [local]
            dist.broadcast_object_list(shared, src=0, group=self._group)
            assert shared[0] is not None
            self.result = shared[0]
        else:
            self.result = self._evaluate_local(model, loader, between_batches, reduce=self.world.is_distributed)
        return self.result

    validate = evaluate

    def compute_batch(self, model: nn.Module, data: Any) -> tuple[Any, Tensor]:
        """Return the output and the mean loss of one batch; override it to evaluate in another way."""
        if self.apply_model is None:
            self.apply_model = make_apply(model, data)
        output = self.apply_model(model, data)
        return output, self.criterion(output, data)

    def where(self, loader: Any) -> str:
        """Say in words which batch is under way, and its samples on this rank."""
        sampler = sampler_of(loader, f"the {self.name.lower()} loader")
        share = sampler.share(self.batch)
        samples = sampler.permutation.indices(sampler.epoch, share.start, share.stop)
        return f"{self.name.lower()} batch {self.batch}, samples {describe_samples(samples.tolist())}"

    def report(self, result: EvaluationResult | None = None) -> str:
        """Log one line per result on rank 0 and return it as a table of text.

        Args:
            result: What to report; by default the last evaluation.
        """
        result = result if result is not None else self.result
        if result is None:
            return f"{self.name}: nothing was evaluated yet"
        unit = "" if result.std_over == "samples" else " (over batches)"
        line = f"{self.name}: loss={result.loss:.4g} ± {result.loss_std:.4g}{unit}"
        line += "".join(f", {name}={value:.4g}" for name, value in result.metrics.items())
        if self.world.is_main:
            logger.info(line)
        rows = [("samples", f"{result.num_samples:,}"), ("loss", f"{result.loss:.6g} ± {result.loss_std:.6g}{unit}")]
        rows += [(name, f"{value:.6g}") for name, value in result.metrics.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join([self.name, *(f"  {name:<{width}}  {value}" for name, value in rows)])

    def _evaluate_local(
        self, model: nn.Module, loader: Any, between_batches: Callable[[], None] | None, *, reduce: bool
    ) -> EvaluationResult:
        sampler = sampler_of(loader, f"the {self.name.lower()} loader")
        self.metrics.reset()
        # loss sum, sum of squares, batches that are no mean of their samples' losses: nothing here waits for the device
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        num_samples = num_whole = 0  # the second: batches without samples' losses
        with self._evaluating(model) as evaluated:
            for number, data in self._batches(loader):
                count = sampler.share(number).num_local
                output, loss = self.compute_batch(evaluated, data)
                if count:  # otherwise a placeholder: this rank has no sample of this global batch
                    num_samples += count
                    num_whole += self._add(sums, output, loss, data, count)
                if between_batches is not None:
                    between_batches()
        local = torch.cat([sums, sums.new_tensor([num_samples, num_whole]), self.metrics.sums.flatten()])
        total = (reduce_sum(local) if reduce else local).cpu()
        loss_sum, square_sum, num_not_mean, count, num_whole = total[:5].tolist()
        mean = loss_sum / count
        per_sample = num_whole == 0 and num_not_mean == 0
        return EvaluationResult(
            loss=mean,
            loss_std=max(square_sum / count - mean * mean, 0.0) ** 0.5 if mean == mean else mean,
            num_samples=int(count),
            metrics=self.metrics.compute(total[5:], int(count), reduce=reduce),
            std_over="samples" if per_sample else "batches",
        )

    def outputs(self, model: nn.Module, loader: Any) -> Iterator[tuple[int, Any, Any]]:
        """Yield number, output and data of each batch of this rank, a placeholder's too."""
        with self._evaluating(model) as evaluated:
            for number, data in self._batches(loader):
                if self.apply_model is None:
                    self.apply_model = make_apply(evaluated, data)
                yield number, self.apply_model(evaluated, data), data

    def _batches(self, loader: Any) -> Iterator[tuple[int, Any]]:
        batches, move = self._feed.of(loader), self._feed.move
        for number in range(len(sampler_of(loader, f"the {self.name.lower()} loader"))):
            self.batch = number
            data = next(batches)
            yield number, move(data) if move else data

    def _add(self, sums: Tensor, output: Any, loss: Tensor, data: Any, num_samples: int) -> bool:
        """Add a batch; return whether it could not be taken apart into samples."""
        loss = loss.detach().double()
        if loss.dim() != 0:
            raise ConfigError(
                f"criterion returned a tensor of shape {tuple(loss.shape)}; it must return a scalar, the mean loss "
                "over the samples of the batch. End it with .mean()."
            )
        samples = self._sample_losses(output, data, num_samples)
        whole = samples is None
        samples = loss.expand(num_samples) if samples is None else samples
        not_mean = (samples.mean() - loss).abs() > _TOLERANCE * loss.abs().clamp(min=1e-6)
        squares = torch.where(not_mean, loss.square() * num_samples, samples.square().sum())
        sums += torch.stack([loss * num_samples, squares, not_mean.double()])
        self.metrics.update(output, data, num_samples)
        return whole

    def _sample_losses(self, output: Any, data: Any, num_samples: int) -> Tensor | None:
        if self._vectorised and (isinstance(data, Tensor | tuple | list | dict) or is_graph(data)):
            losses = vectorised_losses(self.criterion, output, data)
            if losses is not None and losses.shape == (num_samples,):
                return losses
            self._vectorised = False
        return sample_losses(self.criterion, output, data, num_samples)

    @contextmanager
    def _evaluating(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give the model on this device in evaluation mode; put each of its modules back into the mode it was in."""
        model = _on_device(model, self.device)
        modes = {module: module.training for module in model.modules()}
        model.eval()
        autocast = torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None)
        # Streams and events are those of the current device.
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        try:
            with current, torch.no_grad(), autocast:
                yield model
        finally:
            for module, training in modes.items():
                module.training = training


class DefaultTester(DefaultValidator):
    """Evaluates the trained model on the test set; see ``DefaultValidator``.

    With ``on="rank0"`` rank 0 needs no other rank: those that call it too get its result, and those that do not may be
    gone.

    Attributes:
        step: Optimizer steps that the model has behind it; the trainer sets it. Ranks that ask for rank 0's result get
            the one of this step.
    """

    name = "Test"

    def _prepare_rank_zero(self) -> None:
        self._handover = Handover(self.world, broadcast_decision(secrets.token_hex(4)))

    def evaluate(
        self, model: nn.Module, loader: Any, between_batches: Callable[[], None] | None = None
    ) -> EvaluationResult:
        """As ``DefaultValidator.evaluate``; collective only where every rank takes its share.

        Raises:
            DataError: Rank 0 is to evaluate alone, but the loader gives it its share only.
            ProcessGroupError: Another rank asked for rank 0's result, but rank 0 does not evaluate.
        """
        if self._handover is None:
            return super().evaluate(model, loader, between_batches)
        sampler = sampler_of(loader, "the test loader")
        if sampler.world_size > 1:
            raise DataError(
                f"Rank 0 is to test alone, but this loader gives each of {sampler.world_size} ranks its share. Fix: "
                "take the test loader that prepare_dataloaders makes, or set testing.on: all."
            )
        what = f"test of {type(loader.dataset).__name__} with {sampler.num_samples} samples at step {self.step}"
        self.result = self._handover.run(what, lambda beat: self._evaluate_local(model, loader, beat, reduce=False))
        return self.result

    test = evaluate


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    parameter = next(model.parameters(), None)
    if parameter is None or is_there(parameter, device):
        return model
    return copy.deepcopy(model).to(device)
