"""The files that a rank leaves in the run's folder: its log, its error, and what the watcher reads of it."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any

WATCH = "EVERYRANK_WATCH"  # in a rank's environment: the folder below which it reports
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


def log_file(log_dir: str, rank: int) -> str:
    """Path of a rank's log."""
    return os.path.join(log_dir, f"rank-{rank}.log")


def error_file(log_dir: str, rank: int) -> str:
    """Path of the file in which a rank records the exception that ended it."""
    return os.path.join(log_dir, f"rank-{rank}.error.json")


def existing(path: str) -> str | None:
    """The path, or None if there is no such file."""
    return path if os.path.exists(path) else None


def read_error(path: str) -> Mapping[str, Any] | None:
    """A rank's record of its exception, or None if it left none that can be read."""
    return read_json(path)


def clear_errors(log_dir: str) -> None:
    """Remove the records of an earlier launch."""
    if os.path.isdir(log_dir):
        for name in os.listdir(log_dir):
            if name.endswith(".error.json"):
                with contextlib.suppress(FileNotFoundError):  # another host shares the folder
                    os.remove(os.path.join(log_dir, name))


def watch_dir(run_dir: str) -> str:
    """Folder below which the ranks of a run report."""
    return os.path.join(run_dir, "watch")


def attempt_dir(watch: str, attempt: int | None = None) -> str:
    """Folder in which the ranks of one attempt report.

    Args:
        watch: The folder below which ranks report.
        attempt: Number of the attempt, from 0; None for that of this rank.
    """
    number = int(os.environ.get(_ATTEMPT) or 0) if attempt is None else attempt
    return os.path.join(watch, f"attempt-{number}")


def newest_attempt(watch: str) -> int:
    """Number of the newest attempt in which a rank has reported; 0 if none has."""
    names = os.listdir(watch) if os.path.isdir(watch) else []
    return max((int(n.rpartition("-")[2]) for n in names if n.startswith("attempt-")), default=0)


def clear_watch(watch: str, older_than_s: float = 0.0) -> None:
    """Remove what the ranks of an earlier launch reported; with ``older_than_s`` only what was written before that.

    Without it everything goes: a clock that was set back since shows the files as not yet written.
    """
    for folder in glob.glob(os.path.join(glob.escape(watch), "attempt-*")):
        with contextlib.suppress(FileNotFoundError):
            newest_s = max((os.stat(path).st_mtime for path in glob.glob(f"{glob.escape(folder)}/*")), default=0.0)
            if not older_than_s or time.time() - newest_s >= older_than_s:
                shutil.rmtree(folder, ignore_errors=True)
    for path in glob.glob(os.path.join(glob.escape(watch), "host-*.json")):
        with contextlib.suppress(FileNotFoundError):
            if not older_than_s or time.time() - os.stat(path).st_mtime >= older_than_s:
                os.remove(path)


def report_file(attempt: str, rank: int) -> str:
    """Path of a rank's last report."""
    return os.path.join(attempt, f"rank-{rank}.report.json")


def beat_file(attempt: str, rank: int) -> str:
    """Path of a rank's sign of life."""
    return os.path.join(attempt, f"rank-{rank}.beat")


def stacks_file(attempt: str, rank: int) -> str:
    """Path of the file to which a rank, and its loader workers, print stacks when a signal asks for them."""
    return os.path.join(attempt, f"rank-{rank}.stacks")


def fatal_file(attempt: str, rank: int) -> str:
    """Path of the file to which a rank prints its stacks when a fatal signal ends it."""
    return os.path.join(attempt, f"rank-{rank}.fatal")


def pace_file(attempt: str) -> str:
    """Path of the file that says how the ranks share their time."""
    return os.path.join(attempt, "pace.json")


def request_file(attempt: str) -> str:
    """Path of the file that asks all ranks for a report, each time it is written."""
    return os.path.join(attempt, "request")


def ask_for_reports(attempt: str, thoroughly: bool = True) -> int:
    """Ask all ranks of an attempt for a report.

    Args:
        attempt: Folder of the attempt.
        thoroughly: With what the workers of their loaders do, who are interrupted for it.

    Returns:
        The number of the request, which the reports then carry.
    """
    with contextlib.suppress(FileNotFoundError), open(request_file(attempt), "w", encoding="ascii") as file:
        file.write("thoroughly" if thoroughly else "")
    return newest_request(attempt)


def newest_request(attempt: str) -> int:
    """The number of the latest request for reports; 0 if there was none."""
    try:
        return os.stat(request_file(attempt)).st_mtime_ns
    except FileNotFoundError:
        return 0


def end_file(attempt: str) -> str:
    """Path of the file that tells the ranks to end, where the watcher cannot reach their processes."""
    return os.path.join(attempt, "end")


def tell_to_end(attempt: str, rank: int | None) -> None:
    """Tell this rank to end, and the others after it, on whatever host they are; None: all at once.

    Those are told that have reported by now: a later launch in the same folder finds the file, and is not meant.
    """
    pids = {}
    for path in glob.glob(os.path.join(glob.escape(attempt), "rank-*.report.json")):
        if row := read_json(path):
            pids[str(row["rank"])] = row["pid"]
    with contextlib.suppress(FileNotFoundError):
        write_whole(end_file(attempt), json.dumps({"rank": rank, "pids": pids}))


def is_told_to_end(attempt: str, rank: int, pid: int) -> bool | None:
    """Whether this process is told to end: True for at once, False for after the guilty one, None for not at all."""
    told = read_json(end_file(attempt))
    if told is None or told["pids"].get(str(rank)) != pid:
        return None
    return told["rank"] in (None, rank)


def write_whole(path: str, text: str) -> None:
    """Write a file so that whoever reads it finds all of it, or what was there before."""
    partial = f"{path}.{os.getpid()}.part"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(partial, path)


def read_json(path: str) -> Mapping[str, Any] | None:
    """A file's content, or None if it is missing, cut off, or no JSON object."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
