"""What a checkpoint of a training run holds, and putting it back."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from everyrank.checkpoint.checkpointer import LoadedCheckpoint
from everyrank.checkpoint.encoding import flatten_state, unflatten_state
from everyrank.checkpoint.shards import laid_out_like
from everyrank.errors import CheckpointError
from everyrank.runtime.world import World
from everyrank.training.hardware.kernels import with_own_kernels
from everyrank.training.loop import Position
from everyrank.training.parallel.own_state import OwnStates
from everyrank.training.parallel.wrapping import free_gathered
from everyrank.training.parts import Parts


def hash_weights(module: nn.Module) -> str:
    """Return a hash of a model's whole state, equal if and only if the states are, bit by bit.

    Collective where the model is sharded (FSDP2).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model_state(module: nn.Module, loaded: LoadedCheckpoint) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        CheckpointError: If they do not fit; the message says which tensors.
    """
    state = unflatten_state(loaded.tensors.get("model", {}), loaded.state["model"])
    try:
        _put_weights(module, state)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint {loaded.path} does not fit the configured model: {error} Configure the model it was made "
            "with, or start anew with training.resume: never."
        ) from error


def _put_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put whole tensors into a model, which may be sharded. Every rank has them."""
    own = module.state_dict()
    module.load_state_dict({name: _fitted(value, own.get(name)) for name, value in state.items()})
    free_gathered(module)


def load_optimizer_state(optimizer: torch.optim.Optimizer, loaded: LoadedCheckpoint, own: OwnStates) -> None:
    """Put a checkpoint's optimizer state back, at any world size and however it was sharded when it was saved.

    Raises:
        CheckpointError: If it does not fit.
    """
    state = own.optimizer_state()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        moments = {
            number: {key: _fitted(value, parameters[number]) for key, value in of_one.items()}
            for number, of_one in state["state"].items()
        }
        optimizer.load_state_dict(with_own_kernels(optimizer, {**state, "state": moments}))
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"The optimizer's state in {loaded.path} does not fit the configured {type(optimizer).__name__}: {error}. "
            "Configure the optimizer it was made with, or start anew with training.resume: never."
        ) from error


def _fitted(value: Any, target: Any) -> Any:
    """Return a tensor laid out over the ranks as ``target`` is, if it has the same shape; anything else as it is."""
    fits = isinstance(value, Tensor) and isinstance(target, Tensor) and value.shape == target.shape
    return laid_out_like(value, target) if fits else value


def pack(
    parts: Parts, position: Position, extra: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the groups of tensors and the common state of a checkpoint; of a sharded model, this rank's part."""
    model, model_rest = flatten_state(dict(parts.module.state_dict()))
    moments, optimizer_rest = flatten_state(parts.optimizer.state_dict())
    tensors: dict[str, dict[str, Tensor]] = {"model": model, "optimizer": moments}
    state: dict[str, Any] = {
        "model": model_rest,
        "optimizer": optimizer_rest,
        "position": asdict(position),
        **extra,
    }
    if parts.scheduler is not None:
        tensors["scheduler"], state["scheduler"] = flatten_state(_plain_state(parts.scheduler.state_dict()))
    if parts.scaler is not None:
        tensors["scaler"], state["scaler"] = flatten_state(parts.scaler.state_dict())
    if parts.ema is not None:
        tensors["ema"], state["ema"] = dict(parts.ema.average), {"num_updates": parts.ema.num_updates}
    if parts.powersgd is not None:
        tensors["powersgd"], state["powersgd"] = flatten_state(parts.powersgd.common_state())
    if parts.local is not None:
        tensors["outer"], state["outer"] = parts.local.state()
    return {name: group for name, group in tensors.items() if group}, state


def unpack(loaded: LoadedCheckpoint, parts: Parts, world: World) -> Position:
    """Put a checkpoint back into the parts of a run, and return the position.

    Raises:
        CheckpointError: If the model or the optimizer does not fit.
    """
    own = OwnStates(loaded, world, keep=parts.local is not None)
    position = Position(**loaded.state["position"])
    load_model_state(parts.module, loaded)
    load_optimizer_state(parts.optimizer, loaded, own)
    for name, part in (("scheduler", parts.scheduler), ("scaler", parts.scaler)):
        if part is not None and name in loaded.state:
            common = unflatten_state(loaded.tensors.get(name, {}), loaded.state[name])
            part.load_state_dict(own.mine.get(name, common) if parts.local is not None else common)
    if parts.powersgd is not None and "powersgd" in loaded.state:
        common = unflatten_state(loaded.tensors.get("powersgd", {}), loaded.state["powersgd"])
        parts.powersgd.load(common, own.powersgd_errors())
    if parts.local is not None:
        parts.local.load(loaded, position.step)
    if parts.ema is not None:
        # A run without an average gives one that starts at its weights.
        source = loaded.tensors.get("ema") or {name: loaded.tensors["model"][name] for name in parts.ema.average}
        parts.ema.load(source, loaded.state.get("ema", {}).get("num_updates", 0))
    return position


def put_foreign(
    parts: Parts,
    step: int,
    model: Mapping[str, Any],
    average: Mapping[str, Any] | None,
    state: Mapping[str, Any] | None,
) -> None:
    """Put state dicts of another program into the parts of a run, as if it had done ``step`` steps.

    Args:
        parts: What the run is made of.
        step: Optimizer steps done.
        model: The model's state dict.
        average: The average's, or None.
        state: The optimizer's, or None. Learning rates are those of the configuration all the same.

    Raises:
        CheckpointError: If they do not fit.
    """
    scheduler = parts.scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "lr_scheduler.step() before optimizer.step()"
        for _ in range(step - scheduler.last_epoch if parts.steps_scheduler else 0):
            scheduler.step()
    rates: list[dict[str, Any]] = [
        {key: group[key] for key in ("lr", "initial_lr") if key in group} for group in parts.optimizer.param_groups
    ]
    try:
        _put_weights(parts.module, model)
        if parts.ema is not None:
            parts.ema.load(average if average is not None else model, 0)
        if state is not None:
            parts.optimizer.load_state_dict(with_own_kernels(parts.optimizer, state))
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"The state to start from does not fit this run: {error}") from error
    for group, rate in zip(parts.optimizer.param_groups, rates, strict=True):
        group.update(rate)


def _plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's state without what is no state: functions, which the configuration gives again."""
    return {
        key: [item if not callable(item) else None for item in value] if isinstance(value, list) else value
        for key, value in state.items()
        if not callable(value)
    }
