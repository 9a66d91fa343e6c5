"""Batches of any form: a function applied to each tensor, in containers that stay what they were."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def is_graph(value: Any) -> bool:
    """Tell whether ``value`` is a PyTorch Geometric object, without importing PyTorch Geometric."""
    module = sys.modules.get("torch_geometric.data.data")
    return module is not None and isinstance(value, module.BaseData)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor], other: Callable[[Any], Any] | None = None) -> Any:
    """Return ``batch`` with ``function`` applied to each tensor; every container keeps its type and further state.

    Mappings, sequences, named tuples, packed sequences, graphs, dataclasses and attrs classes are looked into. The
    batch sizes of a packed sequence are left as they are: torch wants them on the CPU.

    Args:
        batch: Anything.
        function: Applied to each tensor.
        other: Applied to what is neither a container nor a tensor; None leaves it as it is.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    kind = type(batch)
    if kind is PackedSequence:
        data, sizes, *orders = batch
        return PackedSequence(function(data), sizes, *(None if order is None else function(order) for order in orders))
    if isinstance(batch, Mapping):
        return _like_mapping(batch, {key: map_tensors(item, function, other) for key, item in batch.items()})
    if isinstance(batch, list | tuple):
        return _like_sequence(batch, [map_tensors(item, function, other) for item in batch])
    if is_graph(batch):
        return batch.apply(function)
    names = _field_names(batch)
    if names is not None:
        clone = copy.copy(batch)
        for name in names:
            value = map_tensors(getattr(batch, name), function, other)
            object.__setattr__(clone, name, value)  # also where the class is frozen
        return clone
    return batch if other is None else other(batch)


def _like_mapping(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(batch) is dict:
        return items
    if isinstance(batch, MutableMapping):
        clone = copy.copy(batch)
        clone.update(items)
        return clone
    return type(batch)(items)  # type: ignore[call-arg]


def _like_sequence(batch: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    if type(batch) is list:
        return items
    if type(batch) is tuple:
        return tuple(items)
    if hasattr(batch, "_make"):
        return batch._make(items)
    if isinstance(batch, MutableSequence):
        clone = copy.copy(batch)
        clone[:] = items
        return clone
    made = tuple.__new__(type(batch), items)
    if hasattr(batch, "__dict__"):
        made.__dict__.update(vars(batch))
    return made


def _field_names(batch: Any) -> list[str] | None:
    """Return the fields of a dataclass or attrs object, None of anything else."""
    if isinstance(batch, type):
        return None
    if dataclasses.is_dataclass(batch):
        return [field.name for field in dataclasses.fields(batch) if hasattr(batch, field.name)]
    described = getattr(type(batch), "__attrs_attrs__", None)
    return [attribute.name for attribute in described] if described is not None else None
