"""Modules that treat CUDA otherwise: DDP, DataParallel, SyncBatchNorm, FSDP, fused attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

from everyrank.rehearsal.devices import cuda_index
from everyrank.rehearsal.patching import replace


def replace_modules() -> None:
    """Replace what refuses to run on a CPU."""
    ddp: Any = DistributedDataParallel
    replace(ddp, "__init__", _ddp_init(ddp.__init__))
    replace(ddp, "_passing_sync_batchnorm_handle", lambda self, module: None)
    parallel: Any = DataParallel
    replace(parallel, "__init__", _data_parallel_init(parallel.__init__))
    replace(parallel, "forward", lambda self, *args, **kwargs: self.module(*args, **kwargs))
    batch_norm: Any = torch.nn.SyncBatchNorm
    replace(batch_norm, "forward", _sync_batch_norm)


def _ddp_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        for device in device_ids or ():
            cuda_index(device)
        original(self, module, None, None, *args, **kwargs)

    return init


def _data_parallel_init(original: Any) -> Any:
    """All devices of a process are one CPU: the module itself does the work of its replicas."""

    @functools.wraps(original)
    def init(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, dim: int = 0) -> None:
        torch.nn.Module.__init__(self)
        self.module, self.dim = module, dim
        self.device_ids = [cuda_index(device) for device in (device_ids or range(torch.cuda.device_count()))]
        self.output_device = self.device_ids[0] if output_device is None else cuda_index(output_device)

    return init


class _Sum(torch.autograd.Function):
    """The sum over ranks; each rank's part of the gradient is the sum of the gradients of all."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        context.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return _Sum.apply(gradients[0], context.group), None


def _sync_batch_norm(layer: Any, input: torch.Tensor) -> torch.Tensor:
    """Batch normalization with the moments of all ranks' samples, by two sums that autograd sees.

    Ioffe and Szegedy, 2015: the batch's mean and biased variance normalize it, the unbiased one is kept.
    """
    layer._check_input_dim(input)
    use_batch = layer.training or (layer.running_mean is None and layer.running_var is None)
    group = layer.process_group or (dist.group.WORLD if dist.is_initialized() else None)
    if not use_batch or group is None or dist.get_world_size(group) == 1:
        return torch.nn.modules.batchnorm._BatchNorm.forward(layer, input)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    count = x.new_full((1,), x.numel() // x.shape[1])
    sums = _Sum.apply(torch.cat([x.sum(axes), count]), group)
    total = sums[-1].detach()
    shape = [1, -1, *[1] * (x.dim() - 2)]
    mean = sums[:-1] / total
    centred = x - mean.view(shape)
    variance = _Sum.apply((centred * centred).sum(axes), group) / total
    if layer.training and layer.track_running_stats:
        with torch.no_grad():
            layer.num_batches_tracked.add_(1)
            momentum = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
            unbiased = variance * total / (total - 1)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
    result = centred * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.weight is not None:
        result = result * layer.weight.view(shape) + layer.bias.view(shape)
    return result.to(input.dtype)


def attention_on_cpu() -> None:
    """A choice of fused attention kernels also allows the plain one: a CPU has not all of them."""
    from torch.nn import attention

    original: Any = attention.sdpa_kernel

    @functools.wraps(original)
    def sdpa_kernel(backends: Any, set_priority: bool = False) -> Any:
        chosen = list(backends) if isinstance(backends, list | tuple) else [backends]
        return original([*chosen, attention.SDPBackend.MATH], set_priority=set_priority)

    replace(attention, "sdpa_kernel", sdpa_kernel)


def fsdp_on_cpu() -> None:
    """The first FSDP takes a CPU as ``device_id`` only where it is told that a CPU is meant."""
    from torch.distributed import fsdp

    wrapper: Any = fsdp.FullyShardedDataParallel
    original = wrapper.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if cuda_index(kwargs.get("device_id")) is not None or kwargs.get("device_id") is None:
            kwargs["device_id"] = torch.device("cpu")
        original(self, *args, **kwargs)

    wrapper.__init__ = init
