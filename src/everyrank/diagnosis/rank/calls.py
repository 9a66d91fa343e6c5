"""What Python asked of each collective: its line and its reduction.

torch's Flight Recorder does not say SUM or MAX. It has the stacks, but to put them into words it imports
torch's compiler: seconds of work, and an ImportError in the program if its own thread imports that at the same time.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from types import CodeType, FrameType
from typing import Any, NamedTuple

from everyrank.diagnosis.flight import NUM_ENTRIES
from everyrank.diagnosis.frames import Place, where

# Each collective of torch.distributed makes its options by one of these names.
_OPTIONS = (
    "AllreduceOptions",
    "AllreduceCoalescedOptions",
    "ReduceOptions",
    "ReduceScatterOptions",
    "AllgatherOptions",
    "AllToAllOptions",
    "BroadcastOptions",
    "GatherOptions",
    "ScatterOptions",
    "BarrierOptions",
)
_MOST_FRAMES = 16
_Stack = list[tuple[CodeType, int]]

_made: deque[tuple[str, int, Any, _Stack]] = deque(maxlen=NUM_ENTRIES)
_noted: set[str] = set()


class Call(NamedTuple):
    """What Python asked of a collective."""

    reduce: str
    place: str


def note_calls(c10d: Any) -> None:
    """Keep what the latest collectives were asked, about a microsecond for each; once a process.

    Args:
        c10d: The module ``torch.distributed.distributed_c10d``.
    """
    for name in _OPTIONS:
        if name not in _noted and hasattr(c10d, name):
            _noted.add(name)
            setattr(c10d, name, _noting(getattr(c10d, name), c10d))


def _noting(make: Any, c10d: Any) -> Any:
    def noted() -> Any:
        options = make()
        with contextlib.suppress(Exception):  # never the program's trouble
            frame = sys._getframe(1)
            group = frame.f_locals.get("group") or c10d.GroupMember.WORLD
            _made.append((group.group_name, group._get_sequence_number_for_group() + 1, options, _lines(frame)))
        return options

    return noted


def _lines(frame: FrameType | None) -> _Stack:
    lines: _Stack = []
    while frame is not None and len(lines) < _MOST_FRAMES:
        lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return lines


def calls() -> dict[tuple[str, int], Call]:
    """The latest collectives that Python called, by group and number."""
    return {
        (group, seq): Call(
            _name(getattr(options, "reduceOp", None)),
            where([Place(code.co_filename, line, code.co_name) for code, line in lines]) or "",
        )
        for group, seq, options, lines in list(_made)
    }


def _name(reduction: Any) -> str:
    kind = getattr(reduction, "op", None)  # an enumeration, also where a factor comes with it
    return str(getattr(kind, "name", ""))
