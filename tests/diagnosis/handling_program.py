"""A rank that handles an exception: one that it has long dealt with, one that is no fault, or one that ends it.

Or that handles none, and looks whether its signs of life say where it is.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from everyrank.diagnosis.rank_files import attempt_dir, beat_file, report_file
from everyrank.diagnosis.reports import read_beats

RANK = int(os.environ.get("RANK", "0"))
FOLDER = attempt_dir(os.environ["EVERYRANK_WATCH"])


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


def reported() -> bool:
    """Whether this rank has reported that it handles an exception, and given a sign of life after that."""
    text = Path(report_file(FOLDER, RANK)).read_text() if os.path.exists(report_file(FOLDER, RANK)) else "{}"
    report = json.loads(text)
    return bool(report.get("handling")) and last_sign_s() > report["time_s"]


def is_at() -> str:
    """Where this rank is, by its sign of life."""
    beat = read_beats(FOLDER).get(RANK)
    return beat.where if beat else ""


def last_sign_s() -> float:
    return float(json.loads(Path(beat_file(FOLDER, RANK)).read_text())["time_s"])


def handle(meanwhile: Callable[[], Any]) -> None:
    try:
        raise LookupError("not found here")
    except LookupError:
        until(reported)
        meanwhile()


def destroy_and_wait() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        if RANK == 1:
            raise ValueError("the third sample")
        dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()
        until(lambda: RANK == 0)


CASE = sys.argv[1]
if CASE == "before" and RANK == 0:
    handle(lambda: None)
    left_s = time.time()
    until(lambda: last_sign_s() > left_s + 0.001)
    Path("handled").touch()
if CASE == "before" and RANK == 1:
    until(lambda: os.path.exists("handled"))
    raise ValueError("the third sample")
if CASE == "killed" and RANK == 1:
    handle(lambda: os.kill(os.getpid(), signal.SIGKILL))
if CASE == "exits" and RANK == 1:
    handle(lambda: os._exit(4))
if CASE == "beside" and RANK == 0:
    handle(lambda: (Path("handles").touch(), signal.pause()))
if CASE == "beside":
    until(lambda: os.path.exists("handles"))
    os._exit(4)
if CASE == "alone":
    until(lambda: "handling_program.py" in is_at())
    sys.exit("handling_program.py" not in is_at())
if CASE == "cleans up":
    destroy_and_wait()
signal.pause()
