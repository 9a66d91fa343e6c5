"""What Python asked of each collective: its line and its reduction.

torch's Flight Recorder does not say SUM or MAX. It has the stacks, but to put them into words it imports
torch's compiler: seconds of work, and an ImportError in the program if its own thread imports that at the same time.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

from everyrank.diagnosis.flight import NUM_ENTRIES, Collective
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

_made: deque[tuple[str, float, Any, _Stack]] = deque(maxlen=NUM_ENTRIES)
_noted: set[str] = set()


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
            _made.append((group.group_name, time.time(), options, _lines(frame)))
        return options

    return noted


def _lines(frame: FrameType | None) -> _Stack:
    lines: _Stack = []
    while frame is not None and len(lines) < _MOST_FRAMES:
        lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return lines


def with_calls(entries: Sequence[Collective]) -> list[Collective]:
    """Add to a process's own collectives, oldest first, the line and the reduction of those that Python called.

    A call is that of the collective that its group began next. By their numbers they could not be told: gloo counts
    what is sent from one rank to another too, and the Flight Recorder does not.
    """
    noted: dict[str, deque[tuple[float, Any, _Stack]]] = defaultdict(deque)
    for name, time_s, options, lines in list(_made):
        noted[name].append((time_s, options, lines))
    seen: set[str] = set()
    found = []
    for entry in entries:
        calls, call = noted[entry.group.partition(" ")[0]], None
        while calls and calls[0][0] <= entry.time_s:
            call = calls.popleft()
        is_first = entry.group not in seen and entry.seq > 1  # the call may be that of one which torch has forgotten
        seen.add(entry.group)
        found.append(entry if call is None or is_first else _called(entry, *call[1:]))
    return found


def _called(entry: Collective, options: Any, lines: _Stack) -> Collective:
    place = where([Place(code.co_filename, line, code.co_name) for code, line in lines]) or ""
    return replace(entry, reduce=_name(getattr(options, "reduceOp", None)), place=place)


def _name(reduction: Any) -> str:
    kind = getattr(reduction, "op", None)  # an enumeration, also where a factor comes with it
    return str(getattr(kind, "name", ""))
