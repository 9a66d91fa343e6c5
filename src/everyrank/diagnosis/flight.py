"""Torch's Flight Recorder: the collectives that a process has begun, with shapes, types and the lines of the calls.

``TORCH_FR_BUFFER_SIZE`` switches it on; it records gloo and NCCL and can be read from another thread while the main one
is blocked. Its format is torch's own (version 2.10 in torch 2.13); only what is read here is relied on.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUM_ENTRIES = 200  # kept by torch, per process
# What every member of a group must pass alike. The others differ by rank on purpose, such as a root's list of tensors.
_SAME_SIZES = {
    "all_reduce",
    "allreduce",
    "broadcast",
    "reduce",
    "all_gather",
    "allgather",
    "_all_gather_base",
    "barrier",
}
_SAME_TYPES = _SAME_SIZES | {"reduce_scatter", "_reduce_scatter_base", "all_to_all", "alltoall"}


@dataclass(frozen=True)
class Collective:
    """One collective that a rank has begun.

    Attributes:
        group: Name of the process group; of a later world than this process's first one, with that world's number.
        seq: Its number in the group, from 1: the ranks of a group meet in the same number.
        op: Such as ``all_reduce``.
        sizes: Shapes of what was passed, as text.
        dtypes: Types of what was passed, as text.
        place: The user's line; empty where no Python call began it: DDP begins its own in C++.
        done: Whether torch has seen its end.
        reduce: The reduction, such as ``SUM``, where a Python call named it; else empty.
        time_s: When it was begun, by the host's clock.
    """

    group: str
    seq: int
    op: str
    sizes: str
    dtypes: str
    place: str
    done: bool
    reduce: str = ""
    time_s: float = 0.0

    def __str__(self) -> str:
        what = f"{self.op} of {self.sizes} {self.dtypes}" if self.sizes else self.op
        return f"{what} {self.reduce}".rstrip() + f" (number {self.seq}) {self.at}"

    @property
    def at(self) -> str:
        """Where it was begun, as far as Python knows."""
        return f"at {self.place}" if self.place else "(begun in C++, as by DDP)"

    @property
    def content(self) -> tuple[str, ...]:
        """What must be equal on all ranks: not the shapes, for a column and a row of four meet well."""
        sizes = str(num_elements(self.sizes)) if self.op in _SAME_SIZES else ""
        dtypes = self.dtypes if self.op in _SAME_TYPES else ""
        return (self.op, sizes, dtypes)

    @property
    def reduced_content(self) -> tuple[str, ...]:
        """The same, and the reduction."""
        return (*self.content, self.reduce)


def num_elements(sizes: str) -> int:
    """How many elements the shapes in a text such as ``2x3 scalar`` have: 7."""
    return sum(math.prod(int(n) for n in size.split("x")) if size != "scalar" else 1 for size in sizes.split())


Key = tuple[str, int]
"""A collective: its group and its number in it."""


def arrivals_of(entries: Sequence[Collective]) -> dict[Key, float]:
    """When a rank came to each of its collectives."""
    return {(entry.group, entry.seq): entry.time_s for entry in entries}


def read_recorder() -> tuple[list[Collective], dict[str, list[int]]]:
    """What this process has recorded, oldest first, and the ranks of each of its groups.

    Returns:
        Nothing where torch is not imported, has no Flight Recorder, or it is off.
    """
    c10d = getattr(getattr(sys.modules.get("torch"), "_C", None), "_distributed_c10d", None)
    if c10d is None or not hasattr(c10d, "_dump_fr_trace"):
        return [], {}
    trace = pickle.loads(c10d._dump_fr_trace(True, False, False))  # without stacks, see rank/calls.py
    groups = {
        name: json.loads(group["ranks"]) for name, group in (trace.get("pg_config") or {}).items() if group["ranks"]
    }
    leave = getattr(sys.modules.get("torch.distributed.distributed_c10d"), "destroy_process_group", None)
    last_ids = getattr(leave, "last_ids", ())  # see runtime/torch_cures/groups.py
    entries = [_collective(entry, last_ids) for entry in trace.get("entries") or () if not entry["is_p2p"]]
    return entries, groups


def _collective(entry: Mapping[str, Any], last_ids: Sequence[int]) -> Collective:
    sizes = entry["input_sizes"] or ()
    # Torch numbers the groups of every world from 0: one that was joined after another was left has the same names.
    num_left = sum(last < int(entry["pg_id"]) for last in last_ids)
    name = str(entry["process_group"][0])
    return Collective(
        group=f"{name} of world {num_left + 1}" if num_left else name,
        seq=int(entry["collective_seq_id"]),
        op=str(entry["profiling_name"]).rpartition(":")[2],
        sizes=" ".join("x".join(str(n) for n in size) or "scalar" for size in sizes),
        dtypes=" ".join(dict.fromkeys(entry["input_dtypes"] or ())),
        place="",
        done=bool(entry["retired"]),
        time_s=1e-9 * int(entry["time_created_ns"]),
    )


def to_json(entries: Sequence[Collective]) -> list[dict[str, Any]]:
    """For a file."""
    return [dict(vars(entry)) for entry in entries]


@dataclass(frozen=True)
class Departure:
    """Ranks that took part in one collective with different things.

    Attributes:
        odd: The rank that departs from the others, or from what all did before; None if nothing tells.
        skipped: The odd rank began what comes after the collective of the others.
        by_rank: What each rank began under the same number.
        reason: Why the odd one is odd.
    """

    odd: int | None
    skipped: bool
    by_rank: Mapping[int, Collective]
    reason: str


def find_departure(records: Mapping[int, Sequence[Collective]]) -> Departure | None:
    """The first collective in which ranks of a group departed from each other, or None.

    Args:
        records: What each rank recorded, oldest first.
    """
    tables = {rank: {(c.group, c.seq): c for c in entries} for rank, entries in records.items()}
    keys = Counter(key for table in tables.values() for key in table)
    for key in sorted((key for key, count in keys.items() if count > 1), key=lambda key: key[1]):
        found = {rank: table[key] for rank, table in tables.items() if key in table}
        if len({c.content for c in found.values()}) > 1:
            return _departure(found, tables, key, lambda c: c.content)
        if len({c.reduce for c in found.values() if c.reduce}) > 1:
            return _departure(found, tables, key, lambda c: c.reduced_content)
    return None


def _departure(
    found: Mapping[int, Collective],
    tables: Mapping[int, Mapping[tuple[str, int], Collective]],
    key: tuple[str, int],
    content: Callable[[Collective], tuple[str, ...]],
) -> Departure:
    group, seq = key
    common = [c for c in (tables[next(iter(found))].get((group, s)) for s in range(1, seq)) if c is not None]
    votes = Counter(content(c) for c in found.values()).most_common()
    expected: tuple[str, ...] | None = None
    reason = ""
    if votes[0][1] > 1 and (len(votes) == 1 or votes[0][1] > votes[1][1]):
        expected, reason = votes[0][0], f"{votes[0][1]} of {len(found)} ranks agree"
    else:
        expected = _next_by_habit([content(c) for c in common])
        reason = "it departs from what all ranks did in earlier steps"
    odd = [rank for rank, c in found.items() if content(c) != expected]
    if expected is None or len(odd) != 1:
        return Departure(None, False, found, "")
    after = _next_by_habit([*(content(c) for c in common), expected])
    return Departure(odd[0], content(found[odd[0]]) == after, found, reason)


def _next_by_habit(past: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """What followed the last time that the longest run of latest collectives occurred; None if it never did."""
    for length in range(min(len(past) - 1, 16), 0, -1):
        tail = tuple(past[-length:])
        for start in range(len(past) - length - 1, -1, -1):
            if tuple(past[start : start + length]) == tail:
                return past[start + length]
    return None
