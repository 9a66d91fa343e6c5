"""A run that is healthy is never ended, however unusual its program or slow its machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
from waiting import wait_for
from warm_start import Started

from conftest import RunCli
from everyrank.diagnosis.flight import Collective
from everyrank.diagnosis.judging.stalls import judge_stall
from everyrank.diagnosis.proc import ProcessFacts, here
from everyrank.diagnosis.rank.loader_workers import STACKS_SIGNAL
from everyrank.diagnosis.rank_files import clear_watch, is_told_to_end, report_file, request_file, tell_to_end
from everyrank.diagnosis.reports import Report

_EVERYRANK = (sys.executable, "-m", "everyrank")

# Rank 1 keeps the others waiting until it is let go.
_KEEPS_WAITING = """
import os, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    while not os.path.exists("go"):
        time.sleep(0.05)
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
"""

_TELLS_AT_THE_END = """
import os, threading
class Last:
    def __del__(self, names=lambda: [thread.name for thread in threading.enumerate()], read=os.read, say=print):
        say(names(), flush=True)
        say(read(0, 100).decode(), flush=True)
print([thread.name for thread in threading.enumerate()], flush=True)
last = Last()
"""


def test_an_unusual_program_is_not_accused(run_cli: RunCli, tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("unusual_program.py"))
    done = run_cli("run", "driver=torchrun", "driver.nproc_per_node=3", "--", program, program=_EVERYRANK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 3
    assert list(tmp_path.glob("outputs/*/verdict*.json")) == []


_SLOW_DISK = """
import os, time
opened = os.open
def open_slowly(path, *args, **kwargs):
    if str(path).endswith(".beat"):
        time.sleep(2)
    return opened(path, *args, **kwargs)
os.open = open_slowly
"""
_NAMES_THREADS = """
import threading, time
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
time.sleep(1)
print("reports", "everyrank-reporter" in [thread.name for thread in threading.enumerate()])
dist.destroy_process_group()
"""


def test_a_rank_whose_first_word_comes_late_goes_on_reporting(run_cli: RunCli, tmp_path: Path) -> None:
    """One that falls silent would be taken for one that hangs."""
    (tmp_path / "sitecustomize.py").write_text(_SLOW_DISK)
    (tmp_path / "names_threads.py").write_text(_NAMES_THREADS)
    done = run_cli("run", "-n", "2", "--", "names_threads.py", program=_EVERYRANK, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reports True") == 2, done.stdout + done.stderr


def test_time_in_which_the_machine_slept_is_nobodys(start_cli: Callable[..., Started], tmp_path: Path) -> None:
    """All processes are stopped just when the ranks have been asked what they do, for longer than a stall may last."""
    (tmp_path / "keeps_waiting.py").write_text(_KEEPS_WAITING)
    settings = ("driver=torchrun", "app=script", "run.dir=run", "watch.stall_s=6", "watch.end_after_s=12")
    launcher = start_cli(*settings, "--", "keeps_waiting.py")
    request = wait_for(Path(request_file(str(tmp_path / "run/watch/attempt-0"))))
    family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    for process in reversed(family):  # the ranks first: they can no more answer
        process.suspend()
    began_s, asked = time.monotonic(), request.stat().st_mtime_ns
    while time.monotonic() - began_s < 14:
        time.sleep(0.1)
    for process in family:
        process.resume()
    while request.stat().st_mtime_ns == asked and launcher.poll() is None:
        time.sleep(0.05)
    (tmp_path / "go").touch()
    assert launcher.wait(timeout=60) == 0
    assert list(tmp_path.glob("run/verdict*.json")) == []


def _report(rank: int, **facts: object) -> Report:
    """A rank in its second collective."""
    waits = Report(
        **{"rank": rank, "pid": os.getpid(), "started": 0, "host": os.uname().nodename, "here": here(), "time_s": 0.0},
        **{"request": 1, "seq": 2, "ended": None, "stack": (), "where": "train.py:3 in main", "in_collective": True},
        **{"in_backward": False, "in_loader": False, "cpu_s": 0.0, "data_share": 0.0, "reads": None, "handling": None},
        **{"groups": {}, "workers": (), "log_from": 0, "stopped": (), "process": ProcessFacts("S", 0.0, 0)},
        handled=None,
        collectives=tuple(Collective("0", seq, "all_reduce", "4", "Float", "train.py:3", seq < 2) for seq in (1, 2)),
    )
    return replace(waits, **facts)


def test_what_may_go_on_is_not_held_for_an_end() -> None:
    left, waits = _report(1, ended="exit", in_collective=False), _report(0)
    short = replace(left, collectives=left.collectives[:1])
    stall = judge_stall({0: waits, 1: short}, {}, 2)
    assert stall is not None
    assert (stall.rank, stall.provable) == (1, True), "it left before the collective of the other"
    assert judge_stall({0: waits, 1: left}, {}, 2) is None, "both were in it: the other only has not been run since"
    stall = judge_stall({0: replace(waits, is_late=True), 1: short}, {}, 2)
    assert stall is not None
    assert (stall.rank, stall.provable, stall.is_seen) == (None, False, False), "it said so before it fell silent"
    held = _report(1, in_collective=False, collectives=(), process=ProcessFacts("t", 0.0, 0))
    stall = judge_stall({0: waits, 1: held}, {}, 2)
    assert stall is not None
    assert (stall.cause, stall.provable) == ("stopped", False), "somebody debugs it"


def test_of_several_that_do_not_come_the_one_furthest_behind_is_waited_for() -> None:
    ahead = _report(1, in_collective=False, where="train.py:5 in log")
    behind = _report(2, in_collective=False, seq=1, collectives=ahead.collectives[:1], where="train.py:2 in load")
    stall = judge_stall({0: _report(0), 1: ahead, 2: behind}, {}, 3)
    assert stall is not None
    assert (stall.rank, stall.cause, stall.where) == (2, "stuck_in_python", "train.py:2 in load")


def test_a_clock_that_was_set_back_keeps_no_earlier_launch_alive(tmp_path: Path) -> None:
    attempt = tmp_path / "attempt-0"
    attempt.mkdir()
    for path in (attempt / "rank-0.beat", tmp_path / "host-a-1.json"):
        path.write_text("{}")
        os.utime(path, (time.time() + 3600,) * 2)
    clear_watch(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_who_is_told_to_end_is_told_once(tmp_path: Path) -> None:
    """A later launch in the same folder finds the words that were meant for an earlier one."""
    for rank, pid in ((0, 11), (1, 12)):
        Path(report_file(str(tmp_path), rank)).write_text(json.dumps({"rank": rank, "pid": pid}))
    tell_to_end(str(tmp_path), 1)
    assert [is_told_to_end(str(tmp_path), rank, pid) for rank, pid in ((1, 12), (0, 11))] == [True, False]
    assert [is_told_to_end(str(tmp_path), rank, pid) for rank, pid in ((1, 22), (0, 21))] == [None, None]


def _start_rank(folder: Path, code: str) -> subprocess.Popen[str]:
    startup = Path(sys.modules["everyrank"].__file__ or "").parent / "startup"
    env = {**os.environ, "RANK": "0", "EVERYRANK_WATCH": str(folder / "watch"), "PYTHONPATH": str(startup)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def test_an_interpreter_that_ends_is_left_in_peace(tmp_path: Path) -> None:
    """No thread of ours is left, which would be thrown out of torch's C++ and abort; a late question is not heard."""
    process = _start_rank(tmp_path, _TELLS_AT_THE_END)
    assert process.stdout is not None
    assert process.stdout.readline() == "['MainThread', 'everyrank-reporter']\n"
    assert process.stdout.readline() == "['MainThread']\n"
    process.send_signal(STACKS_SIGNAL)
    assert process.communicate("still here", timeout=60)[0] == "still here\n"
    assert process.returncode == 0
