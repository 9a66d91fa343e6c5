"""Which kernels a GPU may choose: TF32, cuDNN's fastest, fused optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from everyrank.checkpoint.shards import is_spread
from everyrank.training.config import TrainingConfig

# What an optimizer's group holds that says how a step is computed, not which step: another machine has its own.
_HOW = ("fused", "foreach")
# Those whose fused step exists on CUDA; Adagrad's, for one, is the CPU's alone.
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@contextmanager
def chosen_kernels(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Apply ``tf32`` and ``cudnn_benchmark`` for the block; nothing on other devices than CUDA, or where both are null.

    They hold for the whole process, so they are put back.
    """
    if device.type != "cuda":
        yield
        return
    wanted: list[tuple[Any, str, Any]] = []
    if config.tf32 is not None:
        precision = "tf32" if config.tf32 else "ieee"
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        wanted += [(place, "fp32_precision", precision) for place in (matmul, cudnn.conv, cudnn.rnn)]  # type: ignore[attr-defined]
    if config.cudnn_benchmark is not None:
        wanted.append((torch.backends.cudnn, "benchmark", config.cudnn_benchmark))
    before = [getattr(place, name) for place, name, _ in wanted]
    try:
        for place, name, value in wanted:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(wanted, before, strict=True):
            setattr(place, name, value)


def fused_if_possible(kind: Any, config: TrainingConfig, module: nn.Module) -> dict[str, bool]:
    """Return ``{"fused": True}`` where an optimizer can step all parameters in one kernel and nobody has said how.

    Not with the scaler of ``mixed_precision: fp16``: a fused optimizer takes over its decision to skip a step, and the
    trainer would have to ask the device a second time whether it did.

    Args:
        kind: The optimizer's class.
        config: The ``training`` section.
        module: The model, on its device.
    """
    given = {*config.optimizer_kwargs, *(key for group in config.parameter_groups for key in group.optimizer_kwargs)}
    if config.mixed_precision == "fp16" or given & {*_HOW, "differentiable"}:
        return {}
    if not (isinstance(kind, type) and issubclass(kind, _FUSED)) or "fused" not in inspect.signature(kind).parameters:
        return {}
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    if issubclass(kind, torch.optim.SGD) and any(is_spread(weight) for weight in trained):
        return {}  # torch has no rule for sharded tensors here
    has_sparse_gradients = any(getattr(part, "sparse", False) for part in module.modules())  # embeddings
    fits = all(weight.is_cuda and weight.is_floating_point() for weight in trained) and not has_sparse_gradients
    return {"fused": True} if fits else {}


def with_own_kernels(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict in which the way to compute a step is this optimizer's own.

    So that a checkpoint of a GPU goes on on a CPU as a run there does, and the other way round.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    if len(saved) != len(own):
        return dict(state)  # does not fit, which torch says
    groups = [
        {**group, **{key: mine[key] for key in _HOW if key in mine}} for group, mine in zip(saved, own, strict=True)
    ]
    return {**state, "param_groups": groups}
