"""The exceptions of everyrank, and how an entry point answers each.

::

    EveryrankError
    ├── UserError (ValueError)          what a person can mend; one message, exit code 2, no traceback
    │   ├── ConfigError                 a key, type or value of a configuration
    │   ├── LaunchEnvironmentError      launcher variables that are half-set or contradict each other
    │   ├── DriverError                 a launch that cannot be planned, or a launcher that is missing
    │   ├── RehearsalError              a part of a GPU program that a CPU cannot rehearse
    │   └── DataError                   data that is missing, or does not have the form that was promised
    ├── ProcessGroupError (RuntimeError)   joining, leaving or using a process group
    │   ├── BarrierTimeoutError         names the ranks that did not come
    │   └── RendezvousError             also a UserError: the processes of a run cannot meet
    ├── CheckpointError (RuntimeError)  a checkpoint that cannot be written or read
    │   └── UnwritableError             also a UserError: the disk is full, or the folder may not be written to
    ├── NonFiniteLossError (RuntimeError)  a loss or weight is NaN or infinite: rank, epoch, step, samples
    ├── RankFailedError (RuntimeError)  a rank raised or died: its rank, traceback and log file
    └── Preempted                       a signal asked the run to stop and its checkpoint is safe; exit code 75
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again and it goes on
EXIT_INTERRUPTED = 130


class EveryrankError(Exception):
    """Base of everything everyrank raises on purpose."""


class UserError(EveryrankError, ValueError):
    """A mistake that the person at the keyboard can mend.

    The message says what was set, what was found, and how to mend it.
    """

    exit_code = EXIT_BAD_INPUT


class ConfigError(UserError):
    """A configuration with wrong keys, types or values; ``problems`` holds every one that was found."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"  - {p}" for p in problems)]))
        self.problems = tuple(problems)


class LaunchEnvironmentError(UserError):
    """Launcher variables that are half-set or contradict each other."""


class DriverError(UserError):
    """A launch that cannot be planned, or a launcher that is not installed."""


class RehearsalError(UserError):
    """A part of a GPU program that cannot be rehearsed on a CPU; the message names it."""


class DataError(UserError):
    """Data that is missing or does not have the promised form."""


class ProcessGroupError(EveryrankError, RuntimeError):
    """Joining, leaving or using a process group failed."""


class BarrierTimeoutError(ProcessGroupError):
    """Some ranks did not reach a monitored barrier in time; ``missing_ranks`` names them."""

    def __init__(self, message: str, missing_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing_ranks = tuple(missing_ranks)


class RendezvousError(ProcessGroupError, UserError):
    """The processes of a run cannot meet: the master is unreachable, its port is taken, or ranks are missing."""


class CheckpointError(EveryrankError, RuntimeError):
    """A checkpoint cannot be written or read."""


class UnwritableError(CheckpointError, UserError):
    """A file of a run cannot be written: the disk is full, or its folder may not be written to."""


class NonFiniteLossError(EveryrankError, RuntimeError):
    """A loss or a weight is not finite, and the run was told to stop then. All ranks raise it.

    Attributes:
        rank: The rank whose loss or weight it is.
        epoch: Epoch, from 0.
        step: Optimizer step, from 1.
        samples: Ids of that rank's samples in the step; empty for weights, which tell of themselves only later.
    """

    def __init__(self, message: str, *, rank: int, epoch: int, step: int, samples: Sequence[int]) -> None:
        super().__init__(message)
        self.rank, self.epoch, self.step, self.samples = rank, epoch, step, tuple(samples)


class RankFailedError(EveryrankError, RuntimeError):
    """A rank raised an exception or died.

    Attributes:
        rank: The global rank that failed first on its own account; None if nothing tells which it was.
        traceback: The original traceback as text, empty if the process was killed by a signal.
        log_file: Path of the rank's log, or None.
        exit_code: The process's exit code; negative for a signal.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None,
        traceback: str = "",
        log_file: str | None = None,
        exit_code: int = EXIT_FAILURE,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback
        self.log_file = log_file
        self.exit_code = exit_code


class Preempted(EveryrankError):
    """A signal asked the run to stop; all ranks agreed on a step and its checkpoint is safe."""

    exit_code = EXIT_PREEMPTED


def did_you_mean(name: object, choices: Iterable[object]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of ``choices``, or an empty string if none is near."""
    names = {str(c).lower(): str(c) for c in choices}
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[close[0]]!r}?" if close else ""
