"""Memory figures: those of the process and the machine, in bytes, in place of a device's."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from typing import Any

from everyrank.rehearsal.devices import count

_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Peak:
    seen = 0


def memory_allocated(device: Any = None) -> int:
    """Bytes of this process that are in memory now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[1]) * _PAGE
    except OSError:  # not Linux: the most it ever was
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _Peak.seen = max(_Peak.seen, now)
    return now


def max_memory_allocated(device: Any = None) -> int:
    """The most bytes that were seen, whenever one asked, since the peak was last reset."""
    memory_allocated()
    return _Peak.seen


def reset_peak_memory_stats(device: Any = None) -> None:
    """Forget the peak."""
    _Peak.seen = 0


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total bytes of a device: the machine's memory, shared out among the devices."""
    total = os.sysconf("SC_PHYS_PAGES") * _PAGE // count()
    return min(total, os.sysconf("SC_AVPHYS_PAGES") * _PAGE // count()), total


def memory_stats(device: Any = None) -> OrderedDict[str, int]:
    """The figures under the names that CUDA's allocator gives them."""
    now, peak = memory_allocated(), max_memory_allocated()
    names = ("allocated_bytes", "active_bytes", "reserved_bytes", "requested_bytes")
    figures = {f"{name}.all.{kind}": value for name in names for kind, value in (("current", now), ("peak", peak))}
    return OrderedDict({**figures, "num_alloc_retries": 0, "num_ooms": 0})


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """One line where CUDA prints a table."""
    return f"rehearsed on a CPU: {memory_allocated()} bytes in memory, at most {max_memory_allocated()} seen"


def nothing(*args: Any, **kwargs: Any) -> None:
    """There is no cache to empty and no limit to set."""


FIGURES = {
    "memory_allocated": memory_allocated,
    "memory_reserved": memory_allocated,
    "max_memory_allocated": max_memory_allocated,
    "max_memory_reserved": max_memory_allocated,
    "reset_peak_memory_stats": reset_peak_memory_stats,
    "reset_accumulated_memory_stats": reset_peak_memory_stats,
    "memory_stats": memory_stats,
    "empty_cache": nothing,
}
OF_CUDA = {
    "memory_cached": memory_allocated,
    "max_memory_cached": max_memory_allocated,
    "reset_max_memory_allocated": reset_peak_memory_stats,
    "reset_max_memory_cached": reset_peak_memory_stats,
    "memory_summary": memory_summary,
    "mem_get_info": mem_get_info,
    "device_memory_used": memory_allocated,
    "set_per_process_memory_fraction": nothing,
    "_record_memory_history": nothing,
    "_dump_snapshot": nothing,
}
