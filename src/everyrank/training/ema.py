"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from everyrank.checkpoint.shards import laid_out_like
from everyrank.training.config import EMAConfig
from everyrank.training.parallel.wrapping import free_gathered


class WeightAverage:
    """Keeps ``average <- decay * average + (1 - decay) * weights``, updated after each optimizer step.

    The average of weights in bfloat16 or float16 is kept in float32: a thousandth of the way to the weights is less
    than half the distance between two bfloat16 numbers, so that in bfloat16 the average would never move.

    Buffers are not averaged: evaluation uses the model's own.

    Args:
        module: The bare model, at its initial weights.
        config: Decay and start.
    """

    def __init__(self, module: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.num_updates = 0
        self._module = module
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self.average = {name: _widened(weight).clone() for name, weight in parameters.items()}
        pairs = [(average, parameters[name]) for name, average in self.average.items()]
        self._alike = _columns([pair for pair in pairs if pair[0].dtype == pair[1].dtype])
        self._wider = _columns([pair for pair in pairs if pair[0].dtype != pair[1].dtype])

    def update(self, num_steps: int = 1) -> None:
        """Take in the weights of one more optimizer step, or those after several steps in place of each of theirs."""
        self.num_updates += num_steps
        decay = self.config.decay if num_steps == 1 else self.config.decay**num_steps
        weight = 1.0 if self.num_updates <= self.config.start_step else 1.0 - decay
        if self._alike[0]:
            torch._foreach_lerp_(*self._alike, weight)
        if self._wider[0]:
            averages, weights = self._wider
            torch._foreach_lerp_(averages, [_widened(narrow) for narrow in weights], weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model for the block, and the trained ones back afterwards."""
        averages, weights = self._wider
        trained = [weight.clone() for weight in weights]
        self._swap(averages)
        try:
            yield
        finally:
            self._swap(trained)

    def _swap(self, wider: list[Tensor]) -> None:
        """Exchange weights and averages of one type, without a second copy of the model; and put in the wider ones."""
        with torch.no_grad():
            for average, weight in zip(*self._alike, strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)
            for weight, value in zip(self._wider[1], wider, strict=True):
                weight.copy_(value)
        # FSDP2 keeps what it has gathered of the root from one forward pass to the next: it would be the old values.
        free_gathered(self._module)

    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from a saved average."""
        self.num_updates = num_updates
        with torch.no_grad():
            for name, average in self.average.items():
                average.copy_(laid_out_like(tensors[name], average))


def _widened(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [average for average, _ in pairs], [weight for _, weight in pairs]
