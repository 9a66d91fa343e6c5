"""How the ranks of a run ended, as its launcher saw it. Plain data: no torch here."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everyrank.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED


@dataclass(frozen=True, kw_only=True)
class RankFailure:
    """How one rank ended, when it did not end well.

    Attributes:
        rank: Its global rank.
        exit_code: Negative for a signal.
        error: The rank's own record of its exception (see ``failures.py``), or None.
        log_file: Its log.
        ended_by_us: The engine sent the signal that ended it, after another rank had failed.
    """

    rank: int
    exit_code: int
    error: Mapping[str, Any] | None = None
    log_file: str | None = None
    ended_by_us: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run on this node.

    Attributes:
        failures: The ranks of the last attempt that did not end well.
        signum: The signal that ended the run, or None.
        message: An error of the engine itself, such as a rendezvous that timed out.
        user_error: ``message`` is something the user can mend.
        num_restarts: How often the group was started again.
    """

    failures: tuple[RankFailure, ...] = ()
    signum: int | None = None
    message: str = ""
    user_error: bool = False
    num_restarts: int = 0
    world_size: int = 0

    @property
    def exit_code(self) -> int:
        """The exit code of the launching process."""
        codes = {f.exit_code for f in self.failures if not f.ended_by_us}
        if EXIT_PREEMPTED in codes and codes <= {EXIT_PREEMPTED, EXIT_OK}:
            return EXIT_PREEMPTED
        if self.signum is not None:
            return EXIT_INTERRUPTED if self.signum == signal.SIGINT else 128 + self.signum
        if self.message:
            return EXIT_BAD_INPUT if self.user_error else EXIT_FAILURE
        # A mistake on one rank is a mistake: the others only lost it.
        own = {f.exit_code for f in self.failures if not f.ended_by_us and not (f.error and f.error.get("lost_peer"))}
        if own == {EXIT_BAD_INPUT}:
            return EXIT_BAD_INPUT
        return EXIT_FAILURE if self.failures else EXIT_OK
