"""What a rank writes down about the exception that ends it, the moment it leaves the rank's program."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from everyrank.diagnosis.classify import is_lost_peer, named_rank
from everyrank.diagnosis.frames import raised_at
from everyrank.diagnosis.rank_files import error_file, write_whole
from everyrank.errors import UserError

_ATTEMPTS = 3


def describe_error(error: BaseException, rank: int, exit_code: int) -> dict[str, Any]:
    """An exception as plain data.

    It has the form that ``torchrun`` reads (``TORCHELASTIC_ERROR_FILE``), with our keys beside it.
    """
    text = "".join(traceback.format_exception(error))
    now_s = time.time()
    return {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": text, "timestamp": str(int(now_s))},
        },
        "rank": rank,
        "pid": os.getpid(),
        "exit_code": exit_code,
        "type": type(error).__name__,
        "text": str(error),
        "notes": list(getattr(error, "__notes__", [])),
        "traceback": text,
        "where": raised_at(error.__traceback__, str(error)),
        "time_s": now_s,
        "user_error": isinstance(error, UserError),
        "lost_peer": is_lost_peer(error),
        "blames": named_rank(error),
    }


def record_error(error: BaseException, rank: int, exit_code: int, log_dir: str | None = None) -> dict[str, Any]:
    """Write the exception that ends this rank where the launcher looks for it, and where torchrun says it does.

    Args:
        error: The exception.
        rank: This process's global rank.
        exit_code: The code this process will exit with.
        log_dir: The folder in which our launchers look; None if none does.

    Returns:
        The record; ``is_written`` in it tells whether a file holds it, which a full disk forbids.
    """
    ours = error_file(log_dir, rank) if log_dir else None
    paths = [path for path in dict.fromkeys((ours, os.environ.get("TORCHELASTIC_ERROR_FILE"))) if path]
    for left in reversed(range(_ATTEMPTS)):
        try:
            return _record(describe_error(error, rank, exit_code), paths)
        except RuntimeError:  # of a signal's handler: torch's raises for each loader worker that ends
            if not left:
                raise
    raise AssertionError


def _record(record: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    num_written = 0
    for path in paths:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_whole(path, json.dumps(record))
            num_written += 1
    return {**record, "is_written": num_written > 0}


def render(record: Mapping[str, Any]) -> str:
    """A rank's own record as text, for a launcher that is not ours."""
    if record["user_error"]:
        return f"error: {record['text']}"
    return str(record["traceback"]).rstrip()
