"""The reduction of each collective that Python calls: torch's Flight Recorder does not say SUM or MAX."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from typing import Any

from everyrank.diagnosis.flight import NUM_ENTRIES

_OPTIONS = ("AllreduceOptions", "ReduceOptions", "ReduceScatterOptions")
_made: deque[tuple[str, int, Any]] = deque(maxlen=NUM_ENTRIES)
_noted: set[str] = set()


def note_reductions(c10d: Any) -> None:
    """Keep the options of the latest collectives, a fraction of a microsecond for each; once a process.

    Args:
        c10d: The module ``torch.distributed.distributed_c10d``, whose functions make their options by these names.
    """
    for name in _OPTIONS:
        if name not in _noted and hasattr(c10d, name):
            _noted.add(name)
            setattr(c10d, name, _noting(getattr(c10d, name), c10d))


def _noting(make: Any, c10d: Any) -> Any:
    def noted() -> Any:
        options = make()
        with contextlib.suppress(Exception):  # never the program's trouble
            group = sys._getframe(1).f_locals.get("group") or c10d.GroupMember.WORLD
            _made.append((group.group_name, group._get_sequence_number_for_group() + 1, options))
        return options

    return noted


def reductions() -> dict[tuple[str, int], str]:
    """``SUM``, ``MAX`` ... of the latest collectives, by group and number."""
    return {(group, seq): _name(options.reduceOp) for group, seq, options in list(_made)}


def _name(reduction: Any) -> str:
    kind = getattr(reduction, "op", None)  # an enumeration, also where a factor comes with it
    return str(getattr(kind, "name", ""))
