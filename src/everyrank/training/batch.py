"""Batches of any form: to the device, into the model, and apart into samples."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from everyrank.data.containers import is_graph, map_tensors


def make_converter(device: torch.device, dtype: torch.dtype | None, channels_last: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that moves a tensor to ``device`` and, if it is floating-point, casts it to ``dtype``.

    Args:
        device: Where to.
        dtype: The type, or None.
        channels_last: Whether a four-dimensional tensor (N, C, H, W) is laid out with its channels last.
    """

    def convert(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensor = tensor.to(device, wanted, non_blocking=True)
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor

    return convert


def make_mover(
    device: torch.device, dtype: torch.dtype | None, channels_last: bool = False
) -> Callable[[Any], Any] | None:
    """Return a function that moves a batch to ``device`` and casts its floating-point tensors to ``dtype``.

    Returns:
        None if there is nothing to do, so that the step need not ask.
    """
    if device.type == "cpu" and dtype is None and not channels_last:
        return None
    convert = make_converter(device, dtype, channels_last)
    return lambda batch: map_tensors(batch, convert, lambda item: move_other(item, device))


def move_other(item: Any, device: torch.device) -> Any:
    """Return what a batch holds beside tensors on ``device``, where it knows how to go there (``.to``)."""
    return item.to(device) if callable(getattr(item, "to", None)) else item


def is_there(tensor: Tensor, device: torch.device) -> bool:
    """Tell whether a tensor is on ``device``; one without an index is any of its kind."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def place_criterion(criterion: Any, device: torch.device, dtype: torch.dtype | None, *, in_place: bool) -> Any:
    """Return a criterion whose buffers and parameters (weights of classes, say) are where the batches go.

    Args:
        criterion: Any callable; only a module is looked at.
        device: Where the batches go.
        dtype: Type of the batches' floating-point tensors; None leaves it.
        in_place: Move the module itself; else a copy of it, if there is anything to change.
    """
    if not isinstance(criterion, nn.Module):
        return criterion
    if all(
        is_there(tensor, device) and (not tensor.is_floating_point() or dtype in (None, tensor.dtype))
        for tensor in (*criterion.parameters(), *criterion.buffers())
    ):
        return criterion
    return (criterion if in_place else copy.deepcopy(criterion)).to(device=device, dtype=dtype)


def make_apply(module: nn.Module, batch: Any) -> Callable[[nn.Module, Any], Any]:
    """Return how a model is called with batches like ``batch`` where no ``apply_model`` is configured.

    A tensor, a packed sequence, a graph batch or any other object is the model's one argument. Of a tuple or list the
    first element is. A dictionary is passed by name if the model's ``forward`` asks for names it has, and otherwise
    whole.
    """
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence):
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
    parts = take_apart(output, batch, [slice(index, index + 1) for index in range(num_samples)])
    if parts is None:
        return None
    try:
        losses = [criterion(*part).detach().double().reshape(()) for part in parts]
    except (RuntimeError, ValueError, IndexError):
        return None  # a criterion that needs more than one sample, such as a contrastive one
    return torch.stack(losses)


def take_apart(output: Any, batch: Any, cuts: Sequence[slice]) -> Iterator[tuple[Any, Any]] | None:
    """Return output and batch of some samples each, or None where they cannot be taken apart.

    Args:
        output: The model's output.
        batch: The batch.
        cuts: Which samples; the last cut ends with the batch.
    """
    num_samples = cuts[-1].stop
    if not splits(output, num_samples):
        return None
    if not is_graph(batch):
        return ((_cut(output, cut), _cut(batch, cut)) for cut in cuts) if splits(batch, num_samples) else None
    if getattr(batch, "num_graphs", None) != num_samples or not hasattr(batch, "to_data_list"):
        return None
    from torch_geometric.data import Batch

    graphs = batch.to_data_list()
    return ((_cut(output, cut), Batch.from_data_list(graphs[cut])) for cut in cuts)


def vectorised_losses(criterion: Callable[[Any, Any], Tensor], output: Any, batch: Any) -> Tensor | None:
    """Like ``sample_losses``, in one call through ``torch.vmap``; None where the criterion does not allow that.

    Of a graph batch the criterion sees what there is one row of for each graph, such as ``y``; if it asks for nodes or
    edges, it is evaluated graph by graph.
    """
    rows = _rows_of_graphs(batch) if is_graph(batch) else batch

    def one(output_row: Any, batch_row: Any) -> Tensor:
        def restore(tensor: Tensor) -> Tensor:
            return tensor.unsqueeze(0)

        data = map_tensors(batch_row, restore)
        if is_graph(batch):
            data = _OneGraph(data, batch)
        return criterion(map_tensors(output_row, restore), data).reshape(())

    try:
        return torch.vmap(one)(output, rows).detach().double()
    except Exception:
        # Whatever a criterion does that vmap cannot follow (an `if` on a value, `.item()`, a foreign object) ends here;
        # the caller then evaluates sample by sample, where a true mistake shows itself.
        return None


class _OneGraph:
    """A row of a graph batch, as far as a criterion may look at it without the graph."""

    num_graphs = 1

    def __init__(self, rows: dict[str, Tensor], batch: Any) -> None:
        self._rows, self._batch = rows, batch

    def __getattr__(self, name: str) -> Any:
        if name in self._rows:
            return self._rows[name]
        if name in self._batch or hasattr(type(self._batch), name):
            raise LookupError(f"{name} is not one row a graph")  # no AttributeError, which hasattr would hide
        raise AttributeError(name)

    __getitem__ = __getattr__


def _rows_of_graphs(batch: Any) -> dict[str, Tensor]:
    """Return the tensors of a graph batch that have one row for each graph."""
    return {
        key: value
        for key, value in batch.to_dict().items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and value.shape[0] == getattr(batch, "num_graphs", None)
        and not (batch.is_node_attr(key) or batch.is_edge_attr(key))
    }


def splits(value: Any, num_samples: int) -> bool:
    """Tell whether everything in ``value`` has ``num_samples`` rows."""
    if isinstance(value, PackedSequence):
        return False
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape[0] == num_samples
    if isinstance(value, Mapping):
        return all(splits(item, num_samples) for item in value.values())
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(splits(item, num_samples) for item in value)
    return False


def _cut(value: Any, samples: slice) -> Any:
    return map_tensors(value, lambda tensor: tensor[samples])
