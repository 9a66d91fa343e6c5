"""Batches on their way to the model.

To a GPU they travel on a stream of their own, out of page-locked memory, while the GPU computes the step before. Where
loader processes make them, one more batch is on its way already. On any other device nothing of this happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from everyrank.data.containers import map_tensors
from everyrank.training.batch import make_converter, make_mover, move_other


class Feed:
    """How batches come to a model.

    Args:
        device: Where the model is.
        dtype: Type that floating-point tensors are cast to; None leaves them.
        channels_last: Whether four-dimensional tensors are laid out with their channels last.

    Attributes:
        move: What is left to do with a batch that ``of`` gave; None for nothing.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None, channels_last: bool = False) -> None:
        self._device, self._options = device, (dtype, channels_last)
        self._side: torch.cuda.Stream | None = None
        is_gpu = device.type == "cuda"
        self.move: Callable[[Any], Any] | None = None if is_gpu else make_mover(device, dtype, channels_last)

    def of(self, loader: Any, batches: Iterator[Any] | None = None) -> Iterator[Any]:
        """Return the batches of a loader as the step takes them.

        Args:
            loader: The loader; whether it has processes decides whether batches are fetched ahead.
            batches: Its iterator; None makes one.
        """
        batches = iter(loader) if batches is None else batches
        if self._device.type != "cuda":
            return batches
        # Without processes the loader works in this one: fetching ahead would gain nothing, and what a dataset draws
        # from this process's random numbers would be in a checkpoint one batch too early.
        ahead = getattr(loader, "num_workers", 0) > 0
        self._side = self._side or torch.cuda.Stream(self._device)  # one for good: memory belongs to its stream
        return OnGpu(batches, self._device, *self._options, ahead=ahead, side=self._side)


class OnGpu(Iterator[Any]):
    """Batches copied to a GPU on a stream of their own.

    Args:
        batches: Batches in host memory; only from page-locked memory does a copy run beside the computation.
        device: The GPU.
        dtype: Type that floating-point tensors are cast to, on the GPU; None leaves them.
        channels_last: As in ``Feed``.
        ahead: Whether the copy of the next batch is started before a batch is given out.
        side: The stream to copy on; None makes one.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        device: torch.device,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        *,
        ahead: bool,
        side: torch.cuda.Stream | None = None,
    ) -> None:
        self._batches, self._device, self._ahead = batches, device, ahead
        self._convert = make_converter(device, dtype, channels_last)
        self._side = side if side is not None else torch.cuda.Stream(device)
        self._coming: list[Callable[[], Any]] = []  # at most one

    def __next__(self) -> Any:
        """Return the next batch, which the current stream has been told to wait for.

        What hinders the batch after it is raised when that one is asked for.
        """
        deliver = self._coming.pop() if self._coming else self._start()
        if self._ahead:
            self._coming.append(self._try_to_start())
        return deliver()

    def _try_to_start(self) -> Callable[[], Any]:
        try:
            return self._start()
        except Exception as error:  # of a later step, or the end of the epoch
            found = error

            def fail() -> Any:
                raise found

            return fail

    def _start(self) -> Callable[[], Any]:
        """Take a batch and start its copy; return what gives it out."""
        batch = next(self._batches)
        with torch.cuda.stream(self._side):
            batch = map_tensors(batch, self._copy)
            copied = self._side.record_event()
        return lambda: self._finish(batch, copied)

    def _copy(self, tensor: Tensor) -> Tensor:
        # What is on a GPU already was written on another stream, and only strided memory can be guarded.
        if tensor.is_cuda or tensor.layout is not torch.strided:
            return tensor
        return tensor.to(self._device, non_blocking=True)

    def _finish(self, batch: Any, copied: torch.cuda.Event) -> Any:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)

        def take_over(tensor: Tensor) -> Tensor:
            if tensor.is_cuda and tensor.layout is torch.strided:
                # The memory belongs to the side stream, which may not write to it again before this one has read it.
                tensor.record_stream(stream)
            return self._convert(tensor)

        return map_tensors(batch, take_over, lambda item: move_other(item, self._device))
