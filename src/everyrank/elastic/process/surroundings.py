"""What a process inherits from the one that starts it: a rank inherits it from the launching process of its launch.

An engine may be older than the launch: what the launching process has changed meanwhile must reach the ranks.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass

_IGNORABLE = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The inheritance of a rank, besides its environment, folder and output.

    Attributes:
        argv: ``sys.argv``.
        umask: Permissions that new files do not get; None if it is not known.
        limits: Soft and hard limit by resource, see ``resource``.
        affinity: Cores the process may use.
        ignored: Signals that are ignored, as SIGHUP is under ``nohup``.
        blocked: Signals that are blocked.
    """

    argv: tuple[str, ...]
    umask: int | None
    limits: dict[int, tuple[int, int]]
    affinity: frozenset[int]
    ignored: frozenset[int]
    blocked: frozenset[int]

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this process."""
        return cls(
            argv=tuple(sys.argv),
            umask=_umask(),
            limits=_limits(),
            affinity=frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset(),
            ignored=frozenset(int(s) for s in _IGNORABLE if signal.getsignal(s) == signal.SIG_IGN),
            blocked=frozenset(int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        )

    def enter(self) -> None:
        """Make them this process's, which has just been started."""
        sys.argv[:] = list(self.argv)
        if self.umask is not None:
            os.umask(self.umask)
        for kind, limits in self.limits.items():
            if resource.getrlimit(kind) != limits:
                resource.setrlimit(kind, limits)
        if self.affinity and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.affinity)
        for signum in _IGNORABLE:
            default = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
            signal.signal(signum, signal.SIG_IGN if signum in self.ignored else default)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)


def _umask() -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), None)
    except OSError:
        return None  # os.umask tells it only by changing it, for all threads of a user's process


def _limits() -> dict[int, tuple[int, int]]:
    kinds = {value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}
    return {kind: resource.getrlimit(kind) for kind in sorted(kinds)}
