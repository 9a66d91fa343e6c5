"""What Linux tells of a process from outside: its state, its processor time, what it waits for, its memory's end."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass

_READS_X86_64 = {"0": "read", "17": "pread64", "19": "readv", "45": "recvfrom", "47": "recvmsg", "295": "preadv"}
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class ProcessFacts:
    """One look at a process.

    Attributes:
        state: ``R`` runs, ``S`` waits, ``D`` waits for a device, ``T`` or ``t`` is stopped, ``Z`` has ended.
        cpu_s: Processor time it has used.
        started: When it started, in the kernel's ticks since the boot: with the pid it names a process for good.
    """

    state: str
    cpu_s: float
    started: int


def look_at(pid: int) -> ProcessFacts | None:
    """The process with this pid, or None if there is none here."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return ProcessFacts(fields[0], (int(fields[11]) + int(fields[12])) / _TICKS, int(fields[19]))


def stopped_processes() -> list[list[int]]:
    """Pid and start of every process here that a signal has stopped."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        facts = look_at(int(name)) if name.isdigit() else None
        if facts is not None and facts.state == "T":
            found.append([int(name), facts.started])
    return found


def here() -> str:
    """A name for this host and its process ids: two processes with the same one can look at each other."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{namespace}"
    except OSError:
        return socket.gethostname()


def children_of(pid: int) -> list[int]:
    """The pids of a process's children."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += [int(child) for child in file.read().split()]
    except OSError:
        pass
    return found


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal, so that sending it does not end the process."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            mask = next(line.split()[1] for line in file if line.startswith("SigCgt:"))
    except (OSError, StopIteration):
        return False
    return bool(int(mask, 16) >> (signum - 1) & 1)


def reads_from(thread_id: int) -> str | None:
    """What a thread of this process (its pid for the main one) is blocked reading from; None if it reads nothing."""
    try:
        with open(f"/proc/self/task/{thread_id}/syscall", encoding="ascii") as file:
            fields = file.read().split()
        if platform.machine() != "x86_64" or not fields or fields[0] not in _READS_X86_64:
            return None
        return os.readlink(f"/proc/self/fd/{int(fields[1], 16)}")
    except (OSError, ValueError, IndexError):
        return None


def oom_kills() -> int:
    """How many processes of this control group the kernel has ended for want of memory; 0 where it does not say."""
    for path in _counters():
        try:
            with open(path, encoding="ascii") as file:
                return next(int(line.split()[1]) for line in file if line.split()[0] == "oom_kill")
        except (OSError, StopIteration, ValueError, IndexError):
            continue
    return 0


def _counters() -> list[str]:
    """The files that count, of this process's own group and of the topmost one, of version 2 and 1."""
    group, old = "/", "/"
    try:
        with open("/proc/self/cgroup", encoding="ascii") as file:
            for line in file:
                _, controllers, path = line.strip().split(":", 2)
                if not controllers:
                    group = path
                elif "memory" in controllers.split(","):
                    old = path
    except OSError:
        pass
    root = "/sys/fs/cgroup"
    v2 = [f"{root}{group.rstrip('/')}/memory.events", f"{root}/memory.events"]
    return [*v2, f"{root}/memory{old.rstrip('/')}/memory.oom_control", f"{root}/memory/memory.oom_control"]
