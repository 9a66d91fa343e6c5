"""Batches of any form: to the device, into the model, and apart into samples."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_graph(value: Any) -> bool:
    """Tell whether ``value`` is a PyTorch Geometric object, without importing PyTorch Geometric."""
    module = sys.modules.get("torch_geometric.data.data")
    return module is not None and isinstance(value, module.BaseData)


def make_mover(device: torch.device, dtype: torch.dtype | None) -> Callable[[Any], Any] | None:
    """Return a function that moves a batch to ``device`` and casts its floating-point tensors to ``dtype``.

    Returns:
        None if there is nothing to do, so that the step need not ask.
    """
    if device.type == "cpu" and dtype is None:
        return None

    def convert(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, wanted, non_blocking=True)

    return lambda batch: map_tensors(batch, convert)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``batch`` with ``function`` applied to each tensor; other objects with ``to`` are left as they are."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(item, function) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(item, function) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(item, function) for item in batch)
    if is_graph(batch):
        return batch.apply(function)
    return batch


def make_apply(module: nn.Module, batch: Any) -> Callable[[nn.Module, Any], Any]:
    """Return how a model is called with batches like ``batch`` where no ``apply_model`` is configured.

    A tensor, a graph batch or any other object is the model's one argument. Of a tuple or list the first element is. A
    dictionary is passed by name if the model's ``forward`` asks for names it has, and otherwise whole.
    """
    if isinstance(batch, tuple | list):
        return lambda model, data: model(data[0])
    if isinstance(batch, Mapping):
        empty = inspect.Parameter.empty
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]
        names = [p.name for p in parameters if p.name in batch]
        if names and all(p.name in batch for p in parameters if p.default is empty):
            return lambda model, data: model(**{name: data[name] for name in names})
    return lambda model, data: model(data)


def sample_losses(criterion: Callable[[Any, Any], Tensor], output: Any, batch: Any, num_samples: int) -> Tensor | None:
    """Return the criterion of each sample alone, shape ``(num_samples,)``, or None where a batch cannot be taken apart.

    Tensors (in tuples, lists and mappings too) are taken apart along their first dimension, graph batches by graph.
    """
    if is_graph(batch):
        return _graph_losses(criterion, output, batch, num_samples)
    if not (_splits(output, num_samples) and _splits(batch, num_samples)):
        return None
    try:
        parts = [
            criterion(_rows(output, index), _rows(batch, index)).detach().double().reshape(())
            for index in range(num_samples)
        ]
    except (RuntimeError, ValueError, IndexError):
        return None  # a criterion that needs more than one sample, such as a contrastive one
    return torch.stack(parts)


def vectorised_losses(criterion: Callable[[Any, Any], Tensor], output: Any, batch: Any) -> Tensor | None:
    """Like ``sample_losses``, in one call through ``torch.vmap``; None where the criterion does not allow that."""

    def one(output_row: Any, batch_row: Any) -> Tensor:
        def restore(tensor: Tensor) -> Tensor:
            return tensor.unsqueeze(0)

        return criterion(map_tensors(output_row, restore), map_tensors(batch_row, restore)).reshape(())

    try:
        return torch.vmap(one)(output, batch).detach().double()
    except Exception:
        # Whatever a criterion does that vmap cannot follow (an `if` on a value, `.item()`, a foreign object) ends here;
        # the caller then evaluates sample by sample, where a true mistake shows itself.
        return None


def _graph_losses(criterion: Callable[[Any, Any], Tensor], output: Any, batch: Any, num: int) -> Tensor | None:
    if getattr(batch, "num_graphs", None) != num or not _splits(output, num) or not hasattr(batch, "to_data_list"):
        return None
    from torch_geometric.data import Batch

    graphs = batch.to_data_list()
    parts = [
        criterion(_rows(output, index), Batch.from_data_list([graph])).detach().double().reshape(())
        for index, graph in enumerate(graphs)
    ]
    return torch.stack(parts)


def _splits(value: Any, num_samples: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape[0] == num_samples
    if isinstance(value, Mapping):
        return all(_splits(item, num_samples) for item in value.values())
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_splits(item, num_samples) for item in value)
    return False


def _rows(value: Any, index: int) -> Any:
    return map_tensors(value, lambda tensor: tensor[index : index + 1])
