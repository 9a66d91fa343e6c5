"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from everyrank.training.config import EMAConfig


class WeightAverage:
    """Keeps ``average <- decay * average + (1 - decay) * weights``, updated after each optimizer step.

    Buffers are not averaged: evaluation uses the model's own.

    Args:
        module: The bare model, at its initial weights.
        config: Decay and start.
    """

    def __init__(self, module: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.num_updates = 0
        self._parameters = dict(module.named_parameters())
        self.average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._averages = list(self.average.values())
        self._weights = [parameter.detach() for parameter in self._parameters.values()]

    def update(self, num_steps: int = 1) -> None:
        """Take in the weights of one more optimizer step, or those after several steps in place of each of theirs."""
        self.num_updates += num_steps
        decay = self.config.decay if num_steps == 1 else self.config.decay**num_steps
        weight = 1.0 if self.num_updates <= self.config.start_step else 1.0 - decay
        torch._foreach_lerp_(self._averages, self._weights, weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model for the block, and the trained ones back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for average, weight in zip(self._averages, self._weights, strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)

    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Go on from a saved average."""
        self.num_updates = num_updates
        with torch.no_grad():
            for name, average in self.average.items():
                average.copy_(_like(tensors[name], average))


def _like(full: Tensor, target: Any) -> Tensor:
    """Return a whole tensor as ``target`` is laid out over the ranks."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full.to(target.device), target.device_mesh, target.placements)
    return full
