"""A copy of the training state in host memory: the only thing that training waits for when a checkpoint is saved."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from everyrank.checkpoint.shards import is_spread
from everyrank.checkpoint.tensor_file import Layout, lay_out

Tensors = Mapping[str, torch.Tensor]
_Piece = tuple[np.ndarray, np.ndarray]
_Copy = tuple[torch.Tensor, torch.Tensor]

# Bytes from which on torch would copy a tensor with several threads, bytes of a piece, pieces that are worth a thread,
# and threads that fill memory's bandwidth.
_LARGE = 64 << 10
_PIECE = 4 << 20
_PIECES_A_THREAD = 16
_MAX_THREADS = 4

# Memory that a GPU must have to spare for a copy within it, in sizes of the copy: an allocator's memory is in pieces.
_ROOM = 1.25


@dataclass(frozen=True, kw_only=True)
class Group:
    """The bytes of one file of tensors.

    Attributes:
        header: The file's header.
        data: What follows it, as a one-dimensional uint8 tensor in host memory.
    """

    header: bytes
    data: torch.Tensor


class _Buffer:
    """Host memory for one group of tensors, made once and filled at every checkpoint."""

    def __init__(self, tensors: Tensors) -> None:
        self.signature = _signature(tensors)
        self.layout: Layout = lay_out(tensors)
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        self.data = _host_memory(self.layout.num_bytes, pinned=pinned)
        self.views = {name: self._view(name, tensor) for name, tensor in tensors.items()}

    def _view(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        begin = self.layout.offsets[name]
        data = self.data[begin : begin + tensor.numel() * tensor.element_size()]
        return data.view(tensor.dtype).view(tensor.shape)

    def fill(self, tensors: Tensors) -> list[_Piece]:
        """Copy what is in host memory; return the large plain copies, which are left to ``_copy``."""
        pieces: list[_Piece] = []
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                continue
            if tensor.is_cpu and tensor.nbytes >= _LARGE and tensor.is_contiguous() and not tensor.is_complex():
                begin = self.layout.offsets[name]
                target = self.data[begin : begin + tensor.nbytes].numpy()
                source = tensor.detach().reshape(-1).view(torch.uint8).numpy()
                pieces += [(target[i : i + _PIECE], source[i : i + _PIECE]) for i in range(0, tensor.nbytes, _PIECE)]
            else:
                self.views[name].copy_(tensor)
        return pieces


class Snapshot:
    """Copies groups of tensors into host memory that is kept from one checkpoint to the next.

    Fresh memory costs several times the copy itself, because the system hands it out page by page at the first touch.
    The memory belongs to one checkpoint at a time: ``take`` must not be called before the last one is written.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, _Buffer] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[torch.cuda.Event] = []  # one for each GPU that tensors were copied from

    def prepare(self, groups: Mapping[str, Tensors]) -> None:
        """Set memory aside for these groups, so that the first ``take`` is as fast as the later ones."""
        for group, tensors in groups.items():
            if group not in self._buffers or self._buffers[group].signature != _signature(tensors):
                self._buffers.pop(group, None)  # give the old memory back before asking for new
                self._buffers[group] = _Buffer(tensors)

    def take(self, groups: Mapping[str, Tensors]) -> dict[str, Group]:
        """Copy the tensors. Copies from a GPU are only started; ``synchronize`` waits for them.

        A GPU's tensors are first copied within its memory, on its current stream, which must be the one that wrote
        them: after what wrote the tensors, and before what the caller queues there next, such as an optimizer step, so
        nobody can tear the checkpoint. From there they go to host memory on a stream of their own, beside the training.
        Where training needs the GPU's memory for itself, they go to host memory at once, on the training's stream.
        Shared, strided and empty tensors are each stored as what they look like.

        Raises:
            CheckpointError: If a tensor cannot be stored.
        """
        self.prepare(groups)
        on_gpus: dict[torch.device, list[_Copy]] = {}
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                if tensor.is_cuda:
                    copy = (self._buffers[group].views[name], tensor.detach())
                    on_gpus.setdefault(tensor.device, []).append(copy)
        with torch.no_grad():
            self._copied = [self._start(device, copies) for device, copies in on_gpus.items()]
            _copy([piece for group, tensors in groups.items() for piece in self._buffers[group].fill(tensors)])
        return {
            group: Group(header=self._buffers[group].layout.header, data=self._buffers[group].data) for group in groups
        }

    def _start(self, device: torch.device, copies: list[_Copy]) -> torch.cuda.Event:
        """Start copies from one GPU, on the streams of that GPU, whichever is the current one."""
        stream = torch.cuda.current_stream(device)
        if _has_room(device, sum(tensor.nbytes for _, tensor in copies)):
            copies = [(target, tensor.clone()) for target, tensor in copies]
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(stream)
            stream = self._streams[device]
        with torch.cuda.stream(stream):
            for target, tensor in copies:
                target.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)  # its memory is not given to another before that
        return _record(stream)

    def synchronize(self) -> None:
        """Wait until the copies of the last ``take`` are in host memory. May be called from another thread."""
        for event in self._copied:
            event.synchronize()


def _has_room(device: torch.device, num_bytes: int) -> bool:
    """Whether a GPU has so much memory beyond the most that this process has needed of it at a time."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device) >= _ROOM * num_bytes


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # the writer's thread must sleep meanwhile: training needs its core
    event.record(stream)
    return event


def _copy(pieces: list[_Piece]) -> None:
    """Copy in this thread, with the help of a few others if there is much to copy.

    All take the next piece when they are ready. torch's own copies share each tensor equally among threads that then
    wait for the last: with as many busy processes as processors, as wherever training goes on in earnest, that has been
    seen to take ten times as long.
    """
    remaining = iter(pieces)

    def work() -> None:
        for target, source in remaining:
            np.copyto(target, source)  # without the interpreter's lock

    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(pieces) // _PIECES_A_THREAD)
    helpers = [threading.Thread(target=work) for _ in range(num_threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()


def whole_tensors(tensors: Tensors, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors with every distributed one (FSDP2) gathered whole; collective if there is any.

    Args:
        tensors: The tensors by name, the same names on all ranks.
        keep: Whether this rank needs them. One that does not holds one of them at a time, and returns none.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        found = tensor.full_tensor() if is_spread(tensor) else tensor.detach()  # type: ignore[attr-defined]
        if keep:
            whole[name] = found
    return whole


def _signature(tensors: Tensors) -> list[tuple[str, torch.dtype, torch.Size, bool]]:
    return [(name, tensor.dtype, tensor.shape, tensor.is_cuda) for name, tensor in tensors.items()]


def _host_memory(num_bytes: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    # numpy asks the system for huge pages, which torch does not: a fourth of the time at the first touch.
    memory = np.empty(num_bytes, dtype=np.uint8)
    memory[::4096] = 0
    return torch.from_numpy(memory)
