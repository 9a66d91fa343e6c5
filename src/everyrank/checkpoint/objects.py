"""Checkpoints of objects that have a ``state_dict``: what a loop of one's own needs, in one line each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from everyrank.checkpoint.encoding import flatten_state, unflatten_state
from everyrank.errors import CheckpointError, did_you_mean

_KEY = "objects"


class Stateful(Protocol):
    """Anything whose state can be taken and put back: a module, an optimizer, a scheduler, a sampler."""

    def state_dict(self) -> Any:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go on from a state."""
        ...


def take_states(objects: Mapping[str, Stateful]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Return the tensors of these objects, one group an object, and the rest of their states.

    Modules are stored under the names of their own parameters, without the ``module.`` that DDP puts before them.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, Any] = {}
    for name, item in objects.items():
        if isinstance(item, nn.Module):
            tensors[name] = dict(_unwrap(item).state_dict())
            continue
        found, rest[name] = flatten_state(item.state_dict())
        if found:
            tensors[name] = found
    return tensors, {_KEY: rest}


def named_parameters(objects: Mapping[str, Stateful]) -> dict[str, torch.Tensor]:
    """Return the parameters of all modules among these objects, as ``object.parameter``."""
    modules = {name: _unwrap(item) for name, item in objects.items() if isinstance(item, nn.Module)}
    return {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}


def put_states(
    objects: Mapping[str, Stateful], tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
) -> None:
    """Put back what ``take_states`` returned.

    Raises:
        CheckpointError: If the checkpoint holds no state of one of these objects.
    """
    rest = state.get(_KEY, {})
    held = sorted({*tensors, *rest})
    for name in objects:
        if name not in held:
            raise CheckpointError(
                f"The state of {name!r} was asked for, but the checkpoint holds {', '.join(held) or 'none'}."
                f"{did_you_mean(name, held)} Save and resume the same names."
            )
    for name, item in objects.items():
        if isinstance(item, nn.Module):
            _unwrap(item).load_state_dict(dict(tensors[name]))
        else:
            item.load_state_dict(unflatten_state(tensors.get(name, {}), rest[name]))


def _unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module
