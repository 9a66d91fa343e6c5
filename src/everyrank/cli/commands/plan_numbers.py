"""The numbers of a training run before it runs: steps, shares, learning rate, traffic and checkpoints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from everyrank.data.sampler import GlobalBatchSampler
from everyrank.data.split import split_sizes
from everyrank.training.build import build_optimizer, build_scheduler
from everyrank.training.config import TrainerConfig
from everyrank.training.parallel.config import ParallelConfig
from everyrank.training.parallel.local_updates import build_outer_optimizer
from everyrank.training.parallel.shares import given_shares
from everyrank.training.step import DTYPES

MOST_SIMULATED = 200_000  # scheduler steps that are walked through, a few microseconds each
_BYTES_ON_THE_WIRE = {"bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a run will do.

    Attributes:
        world_size: Number of ranks.
        num_train: Training samples of an epoch.
        num_validation: Validation samples.
        num_test: Test samples.
        global_batch_size: Samples of a global batch over all ranks.
        last_batch_size: Samples of an epoch's last global batch.
        samples_per_rank: Fewest and most samples of a whole global batch on one rank.
        epoch_per_rank: Fewest and most samples of an epoch on one rank.
        steps_per_epoch: Optimizer steps of an epoch.
        num_steps: Optimizer steps of the run.
        learning_rates: First, largest and last learning rate; None where the schedule waits for results.
        num_parameters: Trainable parameters.
        gradient_bytes: Bytes of the gradients (of the updates, if they are local) as they travel, once.
        sent_every: Optimizer steps from one time they travel to the next; 1 without local updates.
        sent_per_step: Bytes each rank then sends: ``2 (n - 1) / n`` of them, by a ring all-reduce (Patarasuk and Yuan,
            2009).
        checkpoint_bytes: Tensors of one checkpoint: weights, their average, optimizer state (with local updates every
            rank's, and the outer one's).
        checkpoint_steps: Steps after which a checkpoint is written in any case.
        most_checkpoints: Checkpoints if validation finds each epoch better than those before, which saves it too.
        num_kept: Checkpoints that are kept at the end.
    """

    world_size: int
    num_train: int
    num_validation: int
    num_test: int
    global_batch_size: int
    last_batch_size: int
    samples_per_rank: tuple[int, int]
    epoch_per_rank: tuple[int, int]
    steps_per_epoch: int
    num_steps: int
    learning_rates: tuple[float, float, float] | None
    num_parameters: int
    gradient_bytes: int
    sent_every: int
    sent_per_step: int
    checkpoint_bytes: int
    checkpoint_steps: tuple[int, ...]
    most_checkpoints: int
    num_kept: int


def compute(config: TrainerConfig, num_samples: int, world_size: int) -> Numbers:
    """Work out a run's numbers without data, processes or memory for the weights.

    Args:
        config: The trainer's configuration.
        num_samples: Samples of the whole dataset.
        world_size: Number of ranks.
    """
    training = config.training
    fractions = config.data.split if config.data is not None else [0.8, 0.1, 0.1]
    num_train, num_validation, num_test = split_sizes(num_samples, fractions)
    global_batch = training.global_batch_size or (training.batch_size or 1) * world_size
    shares = given_shares(config.parallel, world_size)
    batches, last, epoch_per_rank = _epoch(num_train, global_batch, world_size, training.drop_last, shares)
    steps_per_epoch = -(-batches // training.accumulation_steps)
    num_steps = training.num_steps or steps_per_epoch * (training.num_epochs or 0)
    num_epochs = training.num_epochs or num_steps // max(steps_per_epoch, 1)
    module = _skeleton(config)
    parameters = [p for p in module.parameters() if p.requires_grad]
    parallel = config.parallel if config.parallel is not None else ParallelConfig()
    local = parallel.local_updates
    narrow = parallel.comm_hook if local is None else local.compress
    gradient_bytes = sum(p.numel() * _BYTES_ON_THE_WIRE.get(narrow or "", p.element_size()) for p in parameters)
    steps = _checkpoint_steps(config, steps_per_epoch, num_steps, num_epochs)
    validations = {epoch * steps_per_epoch for epoch in _every(config.validation.every, num_epochs)}
    if config.validation.every_n_steps is not None:
        validations = _every(config.validation.every_n_steps, num_steps)
    kept = {step for step in steps if training.keep_every and step % training.keep_every == 0}
    return Numbers(
        world_size=world_size,
        num_train=num_train,
        num_validation=num_validation,
        num_test=num_test,
        global_batch_size=global_batch,
        last_batch_size=last,
        samples_per_rank=(global_batch // world_size, -(-global_batch // world_size)),
        epoch_per_rank=epoch_per_rank,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        learning_rates=_learning_rates(config, num_steps, num_epochs),
        num_parameters=sum(p.numel() for p in parameters),
        gradient_bytes=gradient_bytes,
        sent_every=local.every if local is not None else 1,
        sent_per_step=2 * (world_size - 1) * gradient_bytes // world_size,
        checkpoint_bytes=_checkpoint_bytes(config, module, world_size if local is not None else 1),
        checkpoint_steps=steps,
        most_checkpoints=len({*steps, *(validations if num_validation else ())}),
        num_kept=training.keep_last + training.keep_best + len(kept),
    )


def _epoch(
    num_train: int, global_batch: int, world_size: int, drop_last: bool, shares: list[float] | None
) -> tuple[int, int, tuple[int, int]]:
    """Batches of an epoch, samples of its last one, and the fewest and most samples of an epoch on one rank.

    A rank's share of whole batches is the same in each of them, so two batches tell the epoch.
    """
    if num_train == 0:
        return 0, 0, (0, 0)
    counts = []
    batches = last = 0
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            num_train,
            global_batch_size=global_batch,
            rank=rank,
            world_size=world_size,
            shuffle=False,
            drop_last=drop_last,
            shares=shares,
        )
        batches = len(sampler)
        if batches == 0:
            return 0, 0, (0, 0)
        last = sampler.share(batches - 1).num_global
        counts.append((batches - 1) * sampler.share(0).num_local + sampler.share(batches - 1).num_local)
    return batches, last, (min(counts), max(counts))


def _skeleton(config: TrainerConfig) -> nn.Module:
    """The model without memory for its weights, where it can be made so."""
    dtype = DTYPES[config.training.dtype]
    try:
        with torch.device("meta"):
            return config.model.build().to(dtype=dtype)
    except (NotImplementedError, RuntimeError):  # a model that computes while it is made
        return config.model.build().to(dtype=dtype)


def _learning_rates(config: TrainerConfig, num_steps: int, num_epochs: int) -> tuple[float, float, float] | None:
    """First, largest and last learning rate, by walking through the schedule."""
    optimizer = build_optimizer(nn.Linear(1, 1), dataclasses.replace(config.training, parameter_groups=[]))
    scheduler = build_scheduler(optimizer, config.training.scheduler)
    first = float(optimizer.param_groups[0]["lr"])
    if scheduler is None or config.training.scheduler is None:
        return first, first, first
    by_step = config.training.scheduler.interval == "step"
    turns = num_steps if by_step else num_epochs
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or turns > MOST_SIMULATED:
        return None
    rates = [first]
    optimizer.step()  # else the scheduler warns of the wrong order
    for _ in range(turns - 1):
        scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return first, max(rates), rates[-1]


def _checkpoint_bytes(config: TrainerConfig, module: nn.Module, num_optimizers: int) -> int:
    """Bytes of the tensors of one checkpoint; the optimizer makes its state in a step on gradients of nothing."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    averages = sum(p.numel() * p.element_size() for p in module.parameters()) if config.training.ema else 0
    moments = num_optimizers * _state_bytes(build_optimizer(module, config.training), module)
    local = config.parallel.local_updates if config.parallel is not None else None
    outer = build_outer_optimizer(list(module.parameters()), local.outer_optimizer) if local is not None else None
    return weights + averages + moments + (_state_bytes(outer, module) if outer is not None else 0)


def _state_bytes(optimizer: Any, module: nn.Module) -> int:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _checkpoint_steps(config: TrainerConfig, steps_per_epoch: int, num_steps: int, num_epochs: int) -> tuple[int, ...]:
    training = config.training
    steps = {num_steps} if num_steps else set()
    steps |= _every(training.checkpoint_every_steps, num_steps)
    steps |= {epoch * steps_per_epoch for epoch in _every(training.checkpoint_at, num_epochs)}
    return tuple(sorted(steps))


def _every(number: int | None, last: int) -> set[int]:
    return set(range(number, last + 1, number)) if number else set()
