"""``torch.cuda`` and ``torch.accelerator``: consistent answers of devices that are CPU memory."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

import torch

from everyrank.rehearsal import devices
from everyrank.rehearsal.cuda import memory, random, streams
from everyrank.rehearsal.devices import REAL_DEVICE, asked_by_torch, index_or_current
from everyrank.rehearsal.patching import replace
from everyrank.rehearsal.refusals import refusing

# An Ampere card: bfloat16 and TF32, and nothing that is newer than what a CPU can do as well.
_CAPABILITY = (8, 0)
_NAME = "CPU rehearsing a CUDA device"
_CUDA_VERSION = "12.8"
_CUDNN_VERSION = 91002
_NCCL_VERSION = (2, 27, 5)


def replace_cuda() -> None:
    """Replace the functions of ``torch.cuda``; one that is not known here says that it cannot be rehearsed."""
    cuda: Any = torch.cuda
    known = {**_functions(), **memory.FIGURES, **memory.OF_CUDA, **random.FUNCTIONS}
    for owner in (cuda, cuda.memory, cuda.random, cuda.streams):
        for name, function in known.items():
            if owner is cuda or hasattr(owner, name):
                replace(owner, name, function)
    for name, function in [*vars(cuda).items()]:
        ours = isinstance(function, FunctionType) and function.__module__.startswith("torch.cuda")
        if ours and not name.startswith("_") and name not in known:
            replace(cuda, name, refusing(f"torch.cuda.{name}"))
    for name in ("CUDAGraph", "graph", "MemPool", "CUDAPluggableAllocator"):
        setattr(cuda, name, refusing(f"torch.cuda.{name}"))
    for name in ("all_gather", "all_reduce", "broadcast", "init_rank", "reduce", "reduce_scatter", "unique_id"):
        setattr(cuda.nccl, name, refusing(f"torch.cuda.nccl.{name}"))
    cuda.nccl.version = lambda: _NCCL_VERSION
    for name in ("mark", "range_pop", "range_push", "range_start", "range_end"):
        setattr(cuda.nvtx, name, memory.nothing)
    cuda.profiler.start = cuda.profiler.stop = memory.nothing
    replace(cuda._utils, "_get_device_index", _get_device_index)
    torch.version.cuda = _CUDA_VERSION
    replace(torch.backends.cudnn, "version", lambda: None if asked_by_torch() else _CUDNN_VERSION)
    replace(torch.backends.cudnn, "is_available", lambda: not asked_by_torch())
    replace(torch.backends.cuda, "is_built", lambda: not asked_by_torch())


def replace_accelerator() -> None:
    """Replace the functions of ``torch.accelerator``."""
    accelerator: Any = torch.accelerator
    for name, function in {
        "is_available": _is_available,
        "device_count": _device_count,
        "current_accelerator": _current_accelerator,
        "current_device_index": devices.current,
        "current_device_idx": devices.current,
        "set_device_index": _set_device,
        "set_device_idx": _set_device,
        "current_stream": streams.current_stream,
        "set_stream": streams.set_stream,
        "synchronize": _synchronize,
        "get_memory_info": memory.mem_get_info,
        "device_index": torch.cuda.device,
        **memory.FIGURES,
    }.items():
        replace(accelerator, name, function)


def _functions() -> dict[str, Any]:
    """What ``torch.cuda`` answers about devices and streams."""
    return {
        "is_available": _is_available,
        "device_count": _device_count,
        "current_device": devices.current,
        "set_device": _set_device,
        "_exchange_device": devices.exchange,
        "_maybe_exchange_device": devices.exchange,
        "synchronize": _synchronize,
        "init": memory.nothing,
        "_lazy_init": memory.nothing,
        "_lazy_call": lambda function, **kwargs: None,
        "is_initialized": devices.in_use,
        "ipc_collect": memory.nothing,
        "get_device_name": lambda device=None: _NAME,
        "get_device_capability": lambda device=None: _CAPABILITY,
        "get_device_properties": _properties,
        "get_arch_list": lambda: ["sm_80"],
        "get_gencode_flags": lambda: "",
        "can_device_access_peer": lambda device, peer_device: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "set_sync_debug_mode": memory.nothing,
        "get_sync_debug_mode": lambda: 0,
        "utilization": lambda device=None: 0,
        "memory_usage": lambda device=None: 0,
        "temperature": lambda device=None: 0,
        "power_draw": lambda device=None: 0,
        "clock_rate": lambda device=None: 0,
        "make_graphed_callables": lambda callables, *args, **kwargs: callables,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "StreamContext": streams.StreamContext,
        "stream": streams.stream,
        "current_stream": streams.current_stream,
        "default_stream": streams.default_stream,
        "set_stream": streams.set_stream,
    }


def _is_available() -> bool:
    return not asked_by_torch()


def _device_count() -> int:
    return 0 if asked_by_torch() else devices.count()


def _current_accelerator(check_available: bool = False) -> Any:
    return None if asked_by_torch() else REAL_DEVICE("cuda")


def _set_device(device: Any) -> None:
    devices.exchange(device if isinstance(device, int) else index_or_current(device))


def _synchronize(device: Any = None) -> None:
    index_or_current(device)


def _get_device_index(device: Any, optional: bool = False, allow_cpu: bool = False) -> int:
    """torch's own, but that a result of an operation, which reads as being on the CPU, names the current device."""
    if isinstance(device, int):
        return device
    if device is None and not optional:
        raise ValueError("Expected a torch.device with a specified index or an integer, but got: None")
    return index_or_current(device)


def _properties(device: Any = None) -> SimpleNamespace:
    index = index_or_current(device)
    return SimpleNamespace(
        name=_NAME,
        major=_CAPABILITY[0],
        minor=_CAPABILITY[1],
        total_memory=memory.mem_get_info()[1],
        multi_processor_count=108,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=166912,
        shared_memory_per_multiprocessor=167936,
        warp_size=32,
        L2_cache_size=41943040,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        pci_bus_id=index,
        pci_device_id=0,
        pci_domain_id=0,
        uuid=f"00000000-0000-0000-0000-{index:012d}",
    )
