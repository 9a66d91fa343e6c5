"""A forked rank cannot be told from a fresh interpreter: the same probe, started each way."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import everyrank
from everyrank.elastic import engine_pool
from everyrank.elastic.process.fresh import read_too_early

# What one rank sees of itself. Run by every start method; what may differ is listed below, and nothing else does.
_PROBE = """
import os, sys


def probe():
    import asyncio, locale, logging, multiprocessing, random, resource, signal, tempfile, threading, time, warnings
    import numpy
    import torch

    catching = [s for s in signal.valid_signals() if callable(signal.getsignal(s)) and s != signal.SIGINT]
    return {
        "draws": (random.random(), float(numpy.random.rand()), float(torch.rand(()))),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "debug level": str(torch.distributed.get_debug_level()),
        "umask": _umask(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name},
        "affinity": sorted(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "cwd": os.getcwd(),
        "argv": list(sys.argv),
        "flags": str(sys.flags),
        "path": list(sys.path),
        "locale": (locale.setlocale(locale.LC_ALL), time.tzname),
        "blocked signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "ignored signals": sorted(s for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN),
        "caught signals": catching,
        "wakeup": signal.set_wakeup_fd(-1),
        "terminal": (os.readlink("/proc/self/fd/0"), os.getsid(0) == os.getpid()),
        "descriptors": _descriptors(),
        "threads": [thread.name for thread in threading.enumerate()],
        "children": multiprocessing.active_children(),
        "temporary folder": tempfile.gettempdir(),
        "filters": [str(f) for f in warnings.filters],
        "log levels": {n: x.level for n, x in logging.root.manager.loggerDict.items() if getattr(x, "level", 0)},
        "handlers": str(logging.root.handlers),
        "defaults": (str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()),
        "recursion": sys.getrecursionlimit(),
        "hooks": (sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__),
        "tracing": (sys.gettrace(), sys.getprofile()),
        "environment": {k: v for k, v in os.environ.items() if k not in _MAY_DIFFER},
    }


# Made anew for each launch.
_MAY_DIFFER = {
    *("EVERYRANK_LAUNCH_ID", "EVERYRANK_WATCH", "EVERYRANK_WATCHED"),
    *("MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"),
}


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _descriptors():
    found = {}
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
                if "/watch/" not in target:  # where every rank reports what it does
                    found[name] = target
            except OSError:
                continue
    return found
"""

_VARIABLES = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo", "MY_OWN": "1"}
# How torch starts processes shows in the started ones; and these the engine keeps for its own children.
_OF_SPAWN = ("descriptors", "environment")
_SPAWNS_OWN_VARIABLES = {
    "PYTHONPATH",
    "TORCHELASTIC_SIGNALS_TO_HANDLE",
    "TORCHELASTIC_ENABLE_FILE_TIMER",
    "TORCHELASTIC_ERROR_FILE",
}


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "the_probe.py").write_text(_PROBE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import the_probe

    yield the_probe.probe
    del sys.modules["the_probe"]


def test_a_forked_rank_is_as_a_spawned_one(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_pool.shutdown()  # another test's: its ranks are forked from what it has imported since
    everyrank.launch(int, nproc_per_node=1)  # the engine is warm, and older than what changes now
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mask, cores = os.umask(0o027), os.sched_getaffinity(0)
    monkeypatch.setattr(sys, "argv", ["my_program.py", "--steps=3"])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        os.sched_setaffinity(0, {min(cores)})
        forked = everyrank.launch(probe, start_method="forkserver", env=_VARIABLES)
        spawned = everyrank.launch(probe, start_method="spawn", env=_VARIABLES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.sched_setaffinity(0, cores)
        os.umask(mask)
    draws = [number for seen in (*forked, *spawned) for number in seen.pop("draws")]
    assert len(set(draws)) == len(draws), "two ranks drew the same number, unseeded"
    for one, other in zip(forked, spawned, strict=True):
        assert one.pop("descriptors") == {}, "the rank holds what is not its own"
        other.pop("descriptors")  # torch's own queue and event
        environment, others = one.pop("environment"), other.pop("environment")
        left = {name for name in {*environment, *others} if environment.get(name) != others.get(name)}
        assert left <= _SPAWNS_OWN_VARIABLES
        assert one == other
        assert one["umask"] == 0o027
        assert one["limits"]["RLIMIT_NOFILE"] == (soft - 1, hard)
        assert one["affinity"] == [min(cores)]
        assert one["argv"] == ["my_program.py", "--steps=3"]
        assert one["debug level"].endswith("DETAIL")
        assert one["torch threads"][0] == 2
        assert one["locale"][1] == ("JST", "JST")


def test_a_rank_forked_after_a_preload_holds_its_output_once() -> None:
    """Its forkserver was forked in the middle of a launch."""

    def held() -> dict[str, str]:
        names = (name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
        return {name: os.readlink(f"/proc/self/fd/{name}") for name in names}

    everyrank.launch(int, nproc_per_node=1)
    output = {os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)}
    for found in everyrank.launch(held, preload=["colorsys"]):
        assert {name for name, target in found.items() if target in output} == {"1", "2"}


def test_what_a_rank_draws_is_new_in_each_launch() -> None:
    def draw() -> float:
        import torch

        return float(torch.rand(()))

    drawn = [number for _ in range(3) for number in everyrank.launch(draw)]
    assert len(set(drawn)) == 6


def test_a_rank_finishes_what_it_has_begun(tmp_path: Path) -> None:
    """atexit, a thread that is no daemon, pending work of an executor, temporary folders, buffered output."""

    def leave_things_to_the_end(folder: str) -> str:
        import atexit
        import os
        import tempfile
        import threading
        import time
        import weakref
        from concurrent.futures import ThreadPoolExecutor

        def note(name: str) -> None:
            time.sleep(0.2)
            open(os.path.join(folder, f"{name}-{os.environ['RANK']}"), "w").close()

        atexit.register(note, "atexit")
        threading.Thread(target=note, args=("thread",)).start()
        ThreadPoolExecutor(1).submit(note, "executor")
        weakref.finalize(leave_things_to_the_end, note, "finalizer")
        kept = tempfile.TemporaryDirectory(dir=folder, prefix="temporary-")
        threading.main_thread().kept = kept  # type: ignore[attr-defined]
        return kept.name

    everyrank.launch(leave_things_to_the_end, str(tmp_path))
    expected = {f"{name}-{rank}" for name in ("atexit", "thread", "executor", "finalizer") for rank in (0, 1)}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_variables_that_torch_reads_at_its_import_are_obeyed(capfd: pytest.CaptureFixture[str]) -> None:
    def seen() -> tuple[bool, int, str]:
        import logging
        import sys

        import torch

        level = logging.getLogger("torch._dynamo").getEffectiveLevel()
        return torch.backends.mkldnn.is_available(), sys.flags.hash_randomization, logging.getLevelName(level)

    [(_, randomized, level)] = everyrank.launch(
        seen, nproc_per_node=1, env={"PYTHONHASHSEED": "0", "TORCH_LOGS": "+dynamo"}
    )
    assert (randomized, level) == (0, "DEBUG")
    assert "notice: PYTHONHASHSEED, TORCH_LOGS: read only when a process starts" in capfd.readouterr().err


_EARLY = ("LD_PRELOAD", "MALLOC_ARENA_MAX", "LC_ALL", "LANG", "PYTHONHASHSEED", "PYTHONWARNINGS", "OMP_PROC_BIND")
_LATE = ("OMP_NUM_THREADS", "TORCH_DISTRIBUTED_DEBUG", "PYTHONPATH", "PYTHONBREAKPOINT", "TORCH_HOME", "TZ", "X")
_VALUES = st.dictionaries(st.sampled_from(_EARLY + _LATE), st.sampled_from("ab"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(at_start=_VALUES, wanted=_VALUES)
def test_what_a_fork_cannot_obey_is_named_and_nothing_else(at_start: dict[str, str], wanted: dict[str, str]) -> None:
    changed = {name for name in {*at_start, *wanted} if at_start.get(name) != wanted.get(name)}
    assert read_too_early(at_start, wanted) == sorted(changed & set(_EARLY))


def test_an_edited_module_is_imported_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "edited_between.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    def answer() -> int:
        import edited_between  # type: ignore[import-not-found]

        return edited_between.ANSWER

    for number in (1, 22):
        module.write_text(f"ANSWER = {number}\n")
        assert everyrank.launch(answer, nproc_per_node=1, preload=["edited_between"]) == [number]


def test_flags_of_the_interpreter_reach_the_ranks() -> None:
    program = (
        "import everyrank, sys; print(everyrank.launch(lambda: __import__('sys').flags.optimize, nproc_per_node=1))"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[1]"


@pytest.mark.parametrize("asks", ["input('name? ')", "breakpoint()", "__import__('pdb').set_trace()"])
def test_asking_the_terminal_fails_at_once_and_says_what_to_do(asks: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(everyrank.RankFailedError):
        everyrank.launch(exec, asks, nproc_per_node=1)
    said = capfd.readouterr().err
    assert "a rank has no terminal to read from. Fix: debug the program as one process" in said
