"""The device of this process, chosen by its local rank, and the backend that goes with it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from everyrank.errors import ConfigError, did_you_mean
from everyrank.launch_env.process_environment import ProcessEnvironment

_BACKENDS = ("auto", "gloo", "nccl", "mpi")


def bind_device(environment: ProcessEnvironment, device: str = "auto") -> torch.device:
    """Choose this process's device and make it the current one.

    The local rank picks the GPU. Where a launcher shows each process one GPU only (as Slurm does with
    ``--gpus-per-task=1``), that GPU is device 0 of every process.

    Args:
        environment: The process's place in the run.
        device: ``"auto"`` (CUDA if there is any, else CPU), ``"cpu"``, ``"cuda"``, or one device such as ``"cuda:1"``.

    Raises:
        ConfigError: The device does not exist, or there are fewer GPUs than processes on this node.
    """
    chosen = _parse(device)
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r} was asked for, but this torch ({torch.__version__}) sees no CUDA GPU. Fix: "
            "set device='auto' or 'cpu', or install a torch built for CUDA and check nvidia-smi."
        )
    visible = torch.cuda.device_count()
    index = chosen.index if chosen.index is not None else (0 if visible == 1 else environment.local_rank)
    if index >= visible:
        asked = f"device={device!r}" if chosen.index is not None else f"local rank {environment.local_rank}"
        raise ConfigError(
            f"{asked} needs GPU {index}, but {visible} GPU{'s are' if visible != 1 else ' is'} visible to this "
            f"process. Fix: start at most {visible} processes on this node (nproc_per_node), "
            "widen CUDA_VISIBLE_DEVICES, or set device='cpu'."
        )
    bound = torch.device("cuda", index)
    torch.cuda.set_device(bound)
    return bound


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Return the backend to use: the one asked for if this torch has it, or nccl on CUDA and gloo elsewhere.

    Raises:
        ConfigError: There is no such backend, this torch lacks it, or it does not work on ``device``.
    """
    name = (backend or "auto").lower()
    if name == "auto":
        return "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if ":" in name:  # torch's own form for one backend a device type, such as cpu:gloo,cuda:nccl
        for part in name.split(","):
            choose_backend(part.partition(":")[2], torch.device(part.partition(":")[0]))
        return name
    if name not in _BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {', '.join(_BACKENDS)}.{did_you_mean(name, _BACKENDS)}")
    if not {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}[name]():
        raise ConfigError(
            f"backend={backend!r} was asked for, but this torch ({torch.__version__}) was built without {name}. "
            f"Fix: set backend='auto'{', or build torch from source against your MPI' if name == 'mpi' else ''}."
        )
    if name == "nccl" and device.type != "cuda":
        raise ConfigError(
            f"backend='nccl' was asked for, but this process's device is {device}: nccl moves CUDA tensors only. "
            "Fix: set backend='auto' or 'gloo', or device='cuda'."
        )
    return name


def device_identity(device: torch.device) -> str:
    """Return a name that tells a physical GPU from all others on its host; empty for other devices."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _parse(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"device={device!r} is no device. Fix: use 'auto', 'cpu', 'cuda' or one GPU such as 'cuda:0'."
        ) from None
