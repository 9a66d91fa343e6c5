"""BatchNorm where a rank's share of a batch is one sample: every rank says so before the first step."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import ConfigError

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # SyncBatchNorm takes its statistics over all ranks


def look_at_statistics(module: nn.Module, sampler: GlobalBatchSampler, batches: range) -> None:
    """Have the first forward pass refuse layers that will be given one value a channel.

    How many values of a sample a layer sees (each pixel is one) shows in a forward pass only. All ranks look at the
    same sizes, so all of them refuse at the same place, before any step is taken, and none waits for another.

    Args:
        module: The bare model, in training mode.
        sampler: Of the training data.
        batches: The batches of an epoch that will be trained on.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _NORMS) and layer.training]
    smallest = sampler.share(batches[-1]).num_global if batches else 0
    if not 0 < smallest < 2 * sampler.world_size:
        return
    for name, layer in layers:
        handles: list[Any] = []
        handles.append(layer.register_forward_pre_hook(partial(_look, name, sampler, smallest, handles)))


def _look(
    name: str, sampler: GlobalBatchSampler, smallest: int, handles: list[Any], layer: nn.Module, inputs: tuple[Any, ...]
) -> None:
    handles.pop().remove()
    num_samples, num_channels = inputs[0].shape[:2]
    if inputs[0].numel() != num_samples * num_channels:
        return  # one sample alone has several values a channel
    size, ranks = sampler.global_batch_size, sampler.world_size
    only_last = size >= 2 * ranks
    which = f"the epoch's last, short batch of {smallest}" if only_last else f"each batch of {size}"
    raise ConfigError(
        f"{type(layer).__name__} {name!r} takes no statistics of one sample, but {which} leaves a rank one "
        f"({sampler.num_samples} samples, training.global_batch_size {size}, world size {ranks}). "
        + ("Fix: training.drop_last: true; or " if only_last else "Fix: ")
        + f"training.global_batch_size: {_fitting_size(sampler.num_samples, size, ranks)}, which leaves each rank two "
        "or more; or parallel.sync_batchnorm: true (CUDA), which takes statistics over all ranks; or LayerNorm or "
        "GroupNorm."
    )


def _fitting_size(num_samples: int, size: int, num_ranks: int) -> int:
    """Return the global batch size next to ``size`` whose batches leave each rank two samples or more."""
    least = 2 * num_ranks
    near = (size + sign * distance for distance in range(size + least) for sign in (1, -1))
    fitting = (n for n in near if n >= least and num_samples % n not in range(1, least))
    return next(fitting, least)
