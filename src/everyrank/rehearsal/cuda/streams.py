"""Streams and events: everything is done when it is called, so they only keep order and time."""

from __future__ import annotations

import time
from typing import Any

from everyrank.rehearsal.devices import REAL_DEVICE, current, index_or_current


class Stream:
    """Stands for ``torch.cuda.Stream``."""

    _made = 0

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = REAL_DEVICE("cuda", index_or_current(device))
        self.device_index = self.device.index
        self.device_type = 1  # c10::DeviceType::CUDA
        self.priority = priority
        Stream._made += 1
        self.stream_id = self.cuda_stream = Stream._made
        self._outer: list[Stream] = []

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def query(self) -> bool:
        """Whether all work is done: always."""
        return True

    def wait_stream(self, stream: Any) -> None:
        """What the other stream was given is done already."""

    def wait_event(self, event: Any) -> None:
        """What came before the event is done already."""

    def record_event(self, event: Any = None) -> Event:
        """Record an event, a new one if none is given."""
        event = event or Event()
        event.record(self)
        return event

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured: never."""
        return False

    def __enter__(self) -> Stream:
        self._outer.append(current_stream(self.device))
        set_stream(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        set_stream(self._outer.pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device, self.stream_id) == (other.device, other.stream_id)

    def __hash__(self) -> int:
        return hash((self.device, self.stream_id))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x}>"


class Event:
    """Stands for ``torch.cuda.Event``; ``elapsed_time`` is what passed on the CPU."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing
        self._recorded_s: float | None = None

    def record(self, stream: Any = None) -> None:
        """Take the time: what was given to the stream before is done."""
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """The event has happened already."""

    def query(self) -> bool:
        """Whether the work before the event is done: always."""
        return True

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds between the two events.

        Raises:
            ValueError: One of them does not take the time, or was not recorded.
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._recorded_s is None or end_event._recorded_s is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end_event._recorded_s - self._recorded_s) * 1e3


class StreamContext:
    """Stands for ``torch.cuda.StreamContext``, which ``torch.cuda.stream(s)`` returns."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self.stream is not None:
            self.stream.__exit__()


_DEFAULT: dict[int, Stream] = {}
_CURRENT: dict[int, Stream] = {}


def default_stream(device: Any = None) -> Stream:
    """The default stream of a device."""
    index = index_or_current(device)
    if index not in _DEFAULT:
        _DEFAULT[index] = Stream(index)
        _DEFAULT[index].stream_id = _DEFAULT[index].cuda_stream = 0
    return _DEFAULT[index]


def current_stream(device: Any = None) -> Stream:
    """The current stream of a device."""
    return _CURRENT.get(index_or_current(device)) or default_stream(device)


def set_stream(stream: Stream | None) -> None:
    """Make a stream the current one of its device."""
    if stream is not None:
        _CURRENT[getattr(stream, "device_index", current())] = stream


def stream(stream: Stream | None) -> StreamContext:
    """Use a stream inside a ``with`` block."""
    return StreamContext(stream)
