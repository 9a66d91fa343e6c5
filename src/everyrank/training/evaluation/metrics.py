"""Metrics beside the loss: torchmetrics classes and plain functions, each sample counted once over all ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from everyrank.errors import ConfigError, DataError
from everyrank.runtime.collectives import gather_objects
from everyrank.training.config_data import MetricConfig
from everyrank.training.decisions.criterion import relation_to_parts, undisturbed

_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


def predictions_and_targets(output: Any, batch: Any) -> tuple[Any, Any]:
    """Return what a torchmetrics class compares, where no ``select`` is configured.

    Raises:
        DataError: If the batch has no target in one of the usual places.
    """
    if isinstance(batch, Mapping):
        for key in _TARGET_KEYS:
            if key in batch:
                return output, batch[key]
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        return output, batch[1]
    elif hasattr(batch, "y"):
        return output, batch.y
    raise DataError(
        f"A torchmetrics metric needs targets, but the batch is a {type(batch).__name__} without a second element, an "
        f"attribute y, or a key among {', '.join(_TARGET_KEYS)}. Set validation.metrics.<name>.select to a function "
        "(output, data) that returns (predictions, targets)."
    )


class MetricSet:
    """The metrics of one evaluation.

    Args:
        configs: Metrics by name; values may also be bare functions or torchmetrics objects.
        device: Where torchmetrics keep their state.
    """

    def __init__(self, configs: Mapping[str, Any], device: torch.device) -> None:
        self._stateful: dict[str, tuple[Any, Callable[[Any, Any], tuple[Any, Any]]]] = {}
        self._functions: dict[str, Callable[[Any, Any], Any]] = {}
        self._device = device
        for name, given in configs.items():
            config = given if isinstance(given, MetricConfig) else MetricConfig(type=given)
            metric = _make(name, config)
            if _is_torchmetric(metric):
                # Sums in float64: in float32 they would depend on how the samples are shared among ranks.
                metric = _without_sync(metric.set_dtype(torch.float64).to(device))
                self._stateful[name] = (metric, config.select or predictions_and_targets)
            else:
                self._functions[name] = metric
        self._adding: dict[str, bool] | None = None  # found out by the first batch
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        for metric, _ in self._stateful.values():
            metric.reset()
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=self._device) for name in self._functions}

    def update(self, output: Any, batch: Any, num_samples: int) -> None:
        """Take in one batch."""
        if self._adding is None:
            self._adding = {name: _adds_up(function, output, batch) for name, function in self._functions.items()}
        for metric, select in self._stateful.values():
            metric.update(*select(output, batch))
        for name, function in self._functions.items():
            value = function(output, batch)
            # A number is added as it is: a tensor made of it would be a copy to the device that is waited for.
            value = value.to(self._device).double() if isinstance(value, Tensor) else float(value)
            self._sums[name] += value * num_samples

    @property
    def sums(self) -> Tensor:
        """This rank's sums of the functions over its samples, and which of them are no means: ``(2, functions)``."""
        values = torch.zeros(2, len(self._functions), dtype=torch.float64, device=self._device)
        if self._functions:
            values[0] = torch.stack(list(self._sums.values()))
            values[1] = values.new_tensor([(self._adding or {}).get(name, False) for name in self._functions])
        return values

    def compute(self, total_sums: Tensor, num_samples: int, *, reduce: bool) -> dict[str, float]:
        """Return every metric over all samples. Collective if ``reduce``.

        Args:
            total_sums: ``sums``, added over ranks.
            num_samples: Number of samples over all ranks.
            reduce: Whether other ranks hold samples too.

        Raises:
            ConfigError: A function adds up its samples, where it must return their mean.
        """
        total_sums, num_adding = total_sums.view(2, -1)
        for name, number in zip(self._functions, num_adding.tolist(), strict=True):
            if number:
                raise ConfigError(
                    f"The metric {name!r} adds up its samples: for a batch it returns the sum of what it returns for "
                    "its halves, which depends on the batch size. Fix: return the mean over the samples of the batch."
                )
        values = {name: float(total_sums[i]) / num_samples for i, name in enumerate(self._functions)}
        for name, (metric, _) in self._stateful.items():
            if reduce:
                _merge(name, metric, self._device)
            result = metric.compute()
            parts = result if isinstance(result, Mapping) else {"": result}
            for part, value in parts.items():
                key = f"{name}_{part}" if part else name
                values.update(_scalars(key, value))
        return values


def _adds_up(function: Callable[[Any, Any], Any], output: Any, batch: Any) -> bool:
    found = relation_to_parts(undisturbed(function), output, batch)
    return found is not None and found[0] == "sum"


def _make(name: str, config: MetricConfig) -> Any:
    if isinstance(config.type, type):
        try:
            return config.type(**config.kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The metric {name!r} ({config.type.__name__}) cannot be made: {error}.") from error
    return config.type


def _is_torchmetric(metric: Any) -> bool:
    module = sys.modules.get("torchmetrics")
    return module is not None and isinstance(metric, module.Metric)


def _without_sync(metric: Any) -> Any:
    """Keep a metric from gathering by itself: a second time what has been merged, or where rank 0 evaluates alone."""
    for part in metric.modules():
        if _is_torchmetric(part):
            part.distributed_available_fn = _never
    return metric


def _never() -> bool:
    return False


def _merge(name: str, metric: Any, device: torch.device) -> None:
    """Put the states of all ranks into each rank's metric, in the order of ranks.

    torchmetrics' own synchronisation gathers tensor by tensor, which hangs where a rank has seen no sample; here the
    states travel whole, and a rank that has seen none adds nothing.
    """
    if metric.full_state_update or metric.full_state_update is None:
        raise ConfigError(
            f"The metric {name!r} ({type(metric).__name__}) cannot be added up over ranks (its full_state_update is "
            f"{metric.full_state_update}). Set validation.on: rank0, or use a metric with full_state_update=False."
        )
    state = {key: _to(value, torch.device("cpu")) for key, value in metric.metric_state.items()}
    gathered = [(count, other) for count, other in gather_objects((metric._update_count, state)) if count]
    metric.reset()
    for number, (_, other) in enumerate(gathered):
        metric._update_count = number + 1
        moved = {key: _to(value, device) for key, value in other.items()}
        if number == 0:
            for key, value in moved.items():
                setattr(metric, key, value)
        else:
            # merge_state puts the incoming state first; swap, so that lists stay in the order of ranks.
            mine = dict(metric.metric_state)
            for key, value in moved.items():
                setattr(metric, key, value)
            metric.merge_state(mine)


def _to(value: Any, device: torch.device) -> Any:
    return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)


def _scalars(name: str, value: Any) -> dict[str, float]:
    tensor = torch.as_tensor(value)
    if tensor.numel() == 1:
        return {name: float(tensor)}
    return {f"{name}_{index}": float(item) for index, item in enumerate(tensor.flatten())}
