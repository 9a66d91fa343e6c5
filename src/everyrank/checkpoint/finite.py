"""Whether tensors are finite: asked before weights are saved, and now and then while they are trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from everyrank.checkpoint.shards import is_spread

_MAX_NAMED = 4


def flag_not_finite(weights: Iterable[Tensor], statistics: Iterable[Tensor] = ()) -> Tensor:
    """Return 1.0 if a weight is not finite or a statistic is NaN, else 0.0: a float64 scalar where the weights are.

    It is one pass over the tensors, and nothing waits for the device. Of distributed tensors this rank's parts are
    looked at. Infinite statistics pass: a buffer may be a mask of ``-inf``.
    """
    weight, statistic = _largest(weights), _largest(statistics)
    return (~weight.isfinite() | statistic.isnan().to(weight.device)).double()


def name_not_finite(tensors: Mapping[str, Tensor], *, nan_only: bool = False) -> list[str]:
    """Return the names of the tensors that hold a NaN or, unless ``nan_only``, an infinity."""
    found = []
    for name, tensor in tensors.items():
        if any(bool(part.isnan().any() if nan_only else ~part.isfinite().all()) for part in _parts([tensor])):
            found.append(name)
    return found


def say_names(names: list[str]) -> str:
    """Return a few of the names, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more}"


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest magnitude, NaN if there is one, without waiting for the device."""
    parts = _parts(tensors)
    return torch.nn.utils.get_total_norm(parts, math.inf) if parts else torch.zeros(())


def _parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    local = [tensor.to_local() if is_spread(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]
    return [part.detach() for part in local if part.numel() and (part.is_floating_point() or part.is_complex())]
