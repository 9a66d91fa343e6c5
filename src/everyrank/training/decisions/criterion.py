"""A criterion looked at once: is it the mean over samples that the promise of equal steps rests on?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everyrank.checkpoint.rng import capture_rng, restore_rng
from everyrank.data.containers import is_graph, map_tensors
from everyrank.errors import ConfigError
from everyrank.runtime.agreement import gather_agreed
from everyrank.runtime.logs import get_logger
from everyrank.runtime.process_group import current_world
from everyrank.training.batch import take_apart

logger = get_logger("training")


def look_at_criterion(
    criterion: Callable[[Any, Any], Any], output: Any, data: Any, loss: Any, device: torch.device
) -> None:
    """Compare the loss of a run's first batch with its halves'; log once where it mixes samples. Collective.

    Args:
        criterion: The criterion; random numbers that it draws here are drawn again by whoever is next.
        output: The model's output for the batch.
        data: The batch.
        loss: What the criterion returned for it; what is no scalar is left to others.
        device: Where they are.

    Raises:
        ConfigError: On all ranks, if the criterion adds up its samples' losses.
    """
    kept = capture_rng(device)

    def look() -> bool:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            return True
        with torch.no_grad():
            found = relation_to_parts(undisturbed(criterion), map_tensors(output, Tensor.detach), data)
        relation, values = found if found is not None else ("mean", [])
        if relation == "sum":
            raise ConfigError(
                f"criterion returns the sum of its samples' losses: {values[0]:.6g} for a batch whose halves give "
                f"{values[1]:.6g} and {values[2]:.6g}. A sum trains differently at each world size and batch size. "
                "Fix: return the mean over the samples (reduction='mean', or divide by their number); with SGD a "
                "learning rate times the batch size then takes the same steps."
            )
        return relation == "mean"

    if not all(gather_agreed(look)) and current_world().is_main:
        logger.warning(
            "The criterion is no mean over samples: the loss of a batch is not the mean of its halves' losses. That "
            "may be meant (a contrastive loss, a mean over tokens or nodes); the result then depends on how many ranks "
            "share a batch"
        )
    restore_rng(kept, device)


def relation_to_parts(
    function: Callable[[Any, Any], Any], output: Any, batch: Any
) -> tuple[Literal["mean", "sum", "neither"], list[float]] | None:
    """Compare a function of a batch with the same of its two halves.

    Args:
        function: ``(output, data)`` to a number, such as a criterion; called three times.
        output: The model's output for the batch.
        batch: The batch.

    Returns:
        Whether the whole is the mean of the parts by number of samples, their sum, or neither; and the three values.
        None where that cannot be told: the batch cannot be taken apart, or a value is not finite.
    """
    first = _first_tensor(output)
    num: int = getattr(batch, "num_graphs", None) or 0 if is_graph(batch) else first.shape[0] if first.dim() else 0
    halves = take_apart(output, batch, (slice(0, num // 2), slice(num // 2, num))) if num >= 2 else None
    if halves is None:
        return None
    try:
        whole, *parts = values = [float(function(*part)) for part in ((output, batch), *halves)]
    except (RuntimeError, ValueError, IndexError):
        return None  # a function that needs all samples at once
    if not all(math.isfinite(value) for value in values):
        return None
    tolerance = _tolerance(output) * max(map(abs, values))
    mean = (num // 2 * parts[0] + (num - num // 2) * parts[1]) / num
    if abs(whole - mean) <= tolerance:
        return "mean", values
    return ("sum" if abs(whole - sum(parts)) <= tolerance else "neither"), values


def undisturbed(criterion: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Return a criterion that may be called once more: a module's buffers (a running centre) stay as they are."""
    if not isinstance(criterion, nn.Module) or not any(True for _ in criterion.buffers()):
        return criterion

    def call(output: Any, data: Any) -> Any:
        buffers = {name: buffer.clone() for name, buffer in criterion.named_buffers()}
        return torch.func.functional_call(criterion, buffers, (output, data))

    return call


def _first_tensor(value: Any) -> Tensor:
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found[0] if found else torch.zeros(())


def _tolerance(output: Any) -> float:
    """Return the relative rounding that is borne: autocast may narrow any sum."""
    narrow = _first_tensor(output).dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled()
    return 3e-2 if narrow else 1e-3
