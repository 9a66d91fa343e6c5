"""The verdict: which rank is guilty, of what, and where, as plain data and as a file of the run."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from dataclasses import asdict, dataclass

from everyrank.diagnosis.rank_files import read_json, write_whole

_FILE = "verdict.json"

RAISED = "raised"
EXITED = "exited"
KILLED = "killed"
OUT_OF_MEMORY = "out_of_memory"
LEFT_EARLY = "left_early"
STOPPED = "stopped"
SKIPPED = "skipped_collective"
MISMATCHED = "mismatched_collective"
STUCK_IN_DATA = "stuck_in_data_loading"
STUCK_IN_PYTHON = "stuck_in_python"
STUCK_IN_IO = "stuck_in_io"
LOST_HOST = "lost_host"
UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who is guilty of the end of a run.

    Attributes:
        rank: The guilty rank; None if nothing tells.
        cause: One of the words above.
        said: The cause in plain words, after "rank 1 of 2".
        host: Its host, if known.
        pid: Its process, if known.
        where: ``file.py:41 in function`` of the user's code, if known.
        waiting: Where each of the others stood or how it ended, a line each.
        evidence: What shows it, a line each.
        detected_after_s: Seconds from the last sign of progress to the verdict; None where a process simply ended.
        attempt: Number of the attempt, from 0.
        traceback: The guilty rank's traceback, if it raised.
        log_file: The guilty rank's log.
        exit_code: Its exit code, if known; negative for a signal.
        user_error: A mistake of the user's, told in one message.
    """

    rank: int | None
    cause: str
    said: str
    host: str | None = None
    pid: int | None = None
    where: str | None = None
    waiting: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    detected_after_s: float | None = None
    attempt: int = 0
    traceback: str = ""
    log_file: str | None = None
    exit_code: int | None = None
    user_error: str | None = None

    @property
    def is_stall(self) -> bool:
        """Whether ranks had to be ended because they stood still."""
        return self.detected_after_s is not None


def write_verdict(run_dir: str, verdict: Verdict) -> None:
    """Write ``verdict.json``; the verdict of an earlier attempt stays as ``verdict-<attempt>.json``.

    Where the disk is full there is none: the console shows what it would say.
    """
    path = os.path.join(run_dir, _FILE)
    earlier = read_verdict(run_dir)
    with contextlib.suppress(OSError):
        if earlier is not None and earlier.attempt < verdict.attempt:
            os.replace(path, os.path.join(run_dir, f"verdict-{earlier.attempt}.json"))
        write_whole(path, json.dumps(asdict(verdict), indent=2))


def read_verdict(run_dir: str) -> Verdict | None:
    """The newest verdict of a run, or None."""
    return _read(os.path.join(run_dir, _FILE))


def read_verdicts(run_dir: str) -> tuple[Verdict, ...]:
    """The verdicts of all attempts of a run that failed, in order."""
    found = (_read(path) for path in glob.glob(os.path.join(glob.escape(run_dir), "verdict*.json")))
    return tuple(sorted((verdict for verdict in found if verdict is not None), key=lambda verdict: verdict.attempt))


def _read(path: str) -> Verdict | None:
    row = read_json(path)
    if row is None:
        return None
    try:
        return Verdict(**{**row, **{name: tuple(row.get(name) or ()) for name in ("waiting", "evidence")}})
    except TypeError:
        return None


def clear_verdicts(run_dir: str) -> None:
    """Remove the verdicts of an earlier launch."""
    for name in os.listdir(run_dir) if os.path.isdir(run_dir) else ():
        if name.startswith("verdict") and name.endswith(".json"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(run_dir, name))
