"""Wrapping the model so that gradients travel between ranks: DDP, FSDP2 and compressed gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from everyrank.errors import ConfigError
from everyrank.runtime.flat_tensors import send_from_main
from everyrank.runtime.world import World
from everyrank.training.parallel.compression import narrow_mean
from everyrank.training.parallel.config import ParallelConfig
from everyrank.training.parallel.powersgd import PowerSGD

_POWERSGD = "_everyrank_powersgd"


def prepare_module(module: nn.Module, config: ParallelConfig | None, world: World, device: torch.device) -> nn.Module:
    """Convert BatchNorm layers to SyncBatchNorm if asked for.

    Raises:
        ConfigError: On a CPU, where SyncBatchNorm does not exist.
    """
    if config is None or not config.sync_batchnorm or not world.is_distributed:
        return module
    if device.type != "cuda":
        raise ConfigError(
            f"parallel.sync_batchnorm is true, but the device is {device}: SyncBatchNorm works on CUDA only. Set it to "
            "false, or use a normaliser without batch statistics (LayerNorm, GroupNorm)."
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def wrap(module: nn.Module, config: ParallelConfig | None, world: World, device: torch.device) -> nn.Module:
    """Return the module that the step calls: under DDP or FSDP2, or ``module`` itself at world size 1 and where no
    gradients travel (local updates).

    Raises:
        ConfigError: If an option does not fit the device.
    """
    if config is None or (not world.is_distributed and config.strategy == "ddp"):
        return module
    if config.local_updates is not None:
        return module  # gradients stay on their rank
    if config.strategy == "fsdp2":
        return shard(module, world, device)
    if config.output_device is not None and device.type != "cuda":
        raise ConfigError(
            f"parallel.output_device is {config.output_device!r}, but the device is {device}. Leave it null on a CPU."
        )
    options: dict[str, Any] = {} if config.bucket_cap_mb is None else {"bucket_cap_mb": config.bucket_cap_mb}
    wrapped = DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        output_device=config.output_device,
        find_unused_parameters=config.find_unused_parameters,
        static_graph=config.static_graph,
        forward_sync_buffers=config.broadcast_buffers,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        **options,
    )
    _register_hook(wrapped, config)
    return wrapped


def shard(module: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Shard a module's parameters over the ranks with FSDP2, in place.

    Each element of a ``ModuleList`` or ``Sequential`` (the usual place of blocks), nested ones too, is a unit whose
    parameters are gathered when it runs and freed afterwards; the rest is one more unit. An element that shares a
    parameter with a module outside of itself (tied weights) is no unit of its own: FSDP2 shards a parameter once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise ConfigError(
            "parallel.strategy is fsdp2, but no process group is joined. Start the run with a launcher and join "
            "(everyrank.join() or initialize_ddp), or use strategy ddp."
        )
    mesh = init_device_mesh(device.type, (world.world_size,))
    for unit in _units(module):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def _units(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are to be sharded each by itself, inner ones first, as FSDP2 asks for."""
    uses = _count_uses(module)
    units: dict[nn.Module, None] = {}  # a block that stands in two places is one unit
    for parent in reversed(list(module.modules())):  # children come after their parents in modules()
        if not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        for block in parent:
            if block is module or isinstance(block, nn.ModuleList | nn.ModuleDict):
                continue  # a list is never called, so nothing would gather its parameters
            inside = _count_uses(block)
            if any(parameter.requires_grad for parameter in inside) and all(uses[p] == n for p, n in inside.items()):
                units[block] = None
    return list(units)


def _count_uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Return in how many places of a module each of its parameters is."""
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def free_gathered(module: nn.Module) -> None:
    """Let go of what FSDP2 has gathered, after parameters were changed by hand; nothing for other modules."""
    for part in module.modules():
        if is_sharded(part):
            part.reshard()  # type: ignore[operator]


def powersgd_of(model: nn.Module) -> PowerSGD | None:
    """Return the PowerSGD hook of a wrapped model, or None."""
    return model.__dict__.get(_POWERSGD)


def is_sharded(module: nn.Module) -> bool:
    """Tell whether ``shard`` was applied to ``module``."""
    return hasattr(module, "set_requires_gradient_sync")


def records_its_graph(model: nn.Module) -> bool:
    """Tell whether a wrapped model records in its first backward pass what all later ones do."""
    return isinstance(model, DistributedDataParallel) and model.static_graph


def recording(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context for a backward pass whose gradients are not used: it leaves nothing in the PowerSGD hook."""
    powersgd = powersgd_of(model)
    return powersgd.away() if powersgd is not None else nullcontext()


def without_sync(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which backward passes keep their gradients on the rank (for accumulation)."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    if is_sharded(model):
        return _fsdp_no_sync(model)
    return nullcontext()


@contextmanager
def _fsdp_no_sync(model: nn.Module) -> Iterator[None]:
    """FSDP2's way to accumulate: a switch on the module."""
    switch: Callable[[bool], None] = model.set_requires_gradient_sync  # type: ignore[assignment]
    switch(False)
    try:
        yield
    finally:
        switch(True)


def send_buffers(module: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers (batch statistics), so that all evaluate the same model. Collective."""
    if world.is_distributed:
        send_from_main(list(module.buffers()))


def _register_hook(model: DistributedDataParallel, config: ParallelConfig) -> None:
    if config.comm_hook is None:
        return
    if config.comm_hook == "powersgd":
        hook = PowerSGD(model.module, config)
        model.register_comm_hook(hook, PowerSGD.average)
        model.__dict__[_POWERSGD] = hook
        return
    model.register_comm_hook(torch.bfloat16 if config.comm_hook == "bf16" else torch.float16, narrow_mean)
