"""What a run is made of besides numbers: one bundle for the step, the evaluation and the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from everyrank.training.ema import WeightAverage
from everyrank.training.parallel.local_updates import LocalUpdates
from everyrank.training.parallel.powersgd import PowerSGD
from everyrank.training.parameter_groups import Frozen


@dataclass(kw_only=True)
class Parts:
    """The parts of a run.

    Attributes:
        module: The bare model.
        model: What the step calls: ``module``, or DDP around it.
        optimizer: The optimizer of the bare model's parameters.
        scheduler: The learning-rate scheduler, or None.
        steps_scheduler: Whether the scheduler is stepped after each optimizer step, and not after epochs.
        scaler: The gradient scaler of ``mixed_precision: fp16``, or None.
        ema: The moving average of the weights, or None.
        powersgd: The hook that compresses gradients by PowerSGD, or None.
        local: The local updates, or None.
        frozen: The parts of the model that are frozen at first, or None.
    """

    module: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    steps_scheduler: bool
    scaler: torch.amp.GradScaler | None
    ema: WeightAverage | None
    powersgd: PowerSGD | None
    local: LocalUpdates | None
    frozen: Frozen | None
