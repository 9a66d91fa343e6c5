"""Places in code: which line of a stack is the user's own, and whether the stack waits in a collective or for data."""

from __future__ import annotations

import itertools
import os
import re
import sysconfig
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARY = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "torch/distributed/_functional_collectives.py")
# Frames in which a thread runs the reducer's collectives in C++, without a Python frame of torch.distributed's.
_BACKWARD = ("torch/autograd/graph.py", "torch/nn/parallel/distributed.py", "torch/optim/optimizer.py")
_PRINTED = re.compile(r'^  File "(.+)", line (\d+),? in (.+)$', re.MULTILINE)  # by faulthandler, or a traceback
_LOADERS = ("torch/utils/data/dataloader.py", "everyrank/data/loader.py")
# Coming and going: a rank that still starts keeps the others waiting there, until a timeout that names it.
_JOINING_AND_LEAVING = {"init_process_group", "new_group", "_new_process_group_helper", "destroy_process_group"}
_MAX_FRAMES = 200
# Outside of these a forked rank still has the stack of the process that launched it: ``run.py``, a console script.
_LAUNCHING = tuple(os.path.join(_PACKAGE, room, "") for room in ("cli", "elastic"))


@dataclass(frozen=True)
class Place:
    """One frame of a stack."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"

    @property
    def is_users(self) -> bool:
        """Whether the line is neither torch's, nor another library's, nor Python's, nor our own."""
        if self.file.startswith("<") or "site-packages" in self.file or "dist-packages" in self.file:
            return False
        if self.file.startswith(_PACKAGE):
            return self.file.startswith(os.path.join(_PACKAGE, "apps"))
        return not self.file.startswith(_LIBRARY)


def stack_of(frame: FrameType | None) -> list[Place]:
    """The stack that ends in ``frame``, innermost first."""
    places: list[Place] = []
    while frame is not None and len(places) < _MAX_FRAMES:
        places.append(Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return places


def parse_stack(text: str) -> list[Place]:
    """The stack that faulthandler printed, innermost first."""
    return [Place(file, int(line), function) for file, line, function in _PRINTED.findall(text)]


def is_users_place(text: str) -> bool:
    """Whether a place, as text, is the user's."""
    return Place(text.rpartition(" in ")[0].rpartition(":")[0], 0, "").is_users


def raised_at(trace: TracebackType | None, text: str = "") -> str | None:
    """Where an exception came from: the user's innermost line of its traceback, or the innermost of all.

    Args:
        trace: The traceback.
        text: What the exception says: that of a loader's worker has the worker's traceback in it.
    """
    _, found, worker = text.rpartition("Original Traceback (most recent call last):")
    if found and (stack := parse_stack(worker)):
        return where(stack[::-1])
    entries = [Place(e.filename, e.lineno or 0, e.name) for e in traceback.extract_tb(trace)]
    return where(entries[::-1])


def where(stack: Sequence[Place]) -> str | None:
    """The user's innermost line of a stack (innermost first), or the innermost of all."""
    of_rank = itertools.takewhile(lambda place: not place.file.startswith(_LAUNCHING), stack)
    place = next((place for place in of_rank if place.is_users), stack[0] if stack else None)
    return None if place is None else str(place)


def waits_in_collective(stack: Sequence[Place]) -> bool:
    """Whether a stack is inside one of torch.distributed's calls."""
    inside = _above_the_user(stack)
    return any(p.file.endswith(_COLLECTIVES) for p in inside) and not any(
        p.function in _JOINING_AND_LEAVING for p in inside
    )


def may_wait_in_backward(stack: Sequence[Place]) -> bool:
    """Whether a stack is inside a backward pass or a DDP forward, where C++ may wait in a collective."""
    return any(place.file.endswith(_BACKWARD) for place in _above_the_user(stack))


def waits_for_data(stack: Sequence[Place]) -> bool:
    """Whether a stack is inside a loader's wait for its workers, or makes a batch itself."""
    return any(place.file.endswith(_LOADERS) for place in stack)


def _above_the_user(stack: Sequence[Place]) -> list[Place]:
    """The frames between the user's innermost line and the top: what the user's line is doing."""
    places: list[Place] = []
    for place in stack:
        if place.is_users:
            break
        places.append(place)
    return places
