"""Shared fixtures. One of them proves, after every test, that no process, port or temporary file is left."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm_start
from xdist.scheduler import LoadScopeScheduling

from everyrank.runtime import torch_cures

ROOT = Path(__file__).resolve().parent.parent
_MARK = "EVERYRANK_TEST_SESSION"
_SESSION = uuid.uuid4().hex
_NETWORKED = ("tests/cluster/", "tests/rendezvous/test_two_hosts.py")  # hosts of their own: one set of them at a time
_STARTS = re.compile(r"run_cli|warm_start|subprocess|start_on|Popen|launch\(|spawn\(|nbclient|nbformat")
# Started by the standard library for a whole session, on purpose.
_SESSION_PROCESSES = ("multiprocessing.resource_tracker",)

os.environ[_MARK] = _SESSION
# Several workers share the cores: a second thread of each would spend them on waiting for the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Unbuffered, print() writes a line and its end one after the other, and what two ranks print gets mixed.
os.environ.pop("PYTHONUNBUFFERED", None)
# What is compiled once, pytest's test files too, is not compiled again by each of the many processes to come.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
torch_cures.install()  # as in every rank
gc.disable()  # until all is collected: of what torch and the tests define nothing is garbage
# Ignored in a shell's background job or under nohup, but what the tests start must hear them.
for _signum, _usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _usual)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder of this session's own, so that whatever is left in it is ours."""
    folder = tmp_path_factory.mktemp("scratch")
    previous = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    # torch's compiler makes its cache folder as soon as it is imported, which a bare DistributedDataParallel does.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiler")))
    yield folder
    if engine_pool := sys.modules.get("everyrank.elastic.engine_pool"):
        engine_pool.shutdown()
        assert not _idle_engine(), "the engine of this session's launches is still there"
    tempfile.tempdir = previous[0]
    if previous[1] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = previous[1]


@pytest.fixture(autouse=True)
def _nothing_is_left(_scratch: Path) -> Iterator[None]:
    """Fail the test that leaves a process, a listening port or a temporary file behind."""
    processes, files = set(psutil.pids()), set(os.listdir(_scratch))
    ports = _listening_ports()
    yield
    deadline = time.monotonic() + 10
    while (left := _ours_since(processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    described = [_describe(process) for process in left]
    for process in left:
        process.kill()
    assert not described, f"processes were left behind: {described}"
    assert _listening_ports() <= ports, f"ports were left open: {_listening_ports() - ports}"
    # multiprocessing's folder of a loader process, which that removes when it ends by itself. Those of a rank that is
    # killed are killed too, and torch kills one that has not ended 5 s after it was told to (a crowded machine).
    # torchinductor_: headers that the compiler keeps, wherever TORCHINDUCTOR_CACHE_DIR says.
    kept = ("pymp-", "torchinductor_")
    left_files = {name for name in set(os.listdir(_scratch)) - files if not name.startswith(kept)}
    # What tempfile writes to see whether it can write there, by a process that was killed before it was removed.
    probes = {name for name in left_files if re.fullmatch("[a-z0-9_]{8}", name)}
    left_files -= {name for name in probes if (_scratch / name).read_bytes() in (b"", b"blat")}
    assert not left_files, f"temporary files were left behind: {left_files}"


def _idle_engine() -> set[psutil.Process]:
    """The engine that this process's next launch will use, and its forkservers: a rank has a session of its own."""
    engines = [child for child in _living_children(psutil.Process()) if "everyrank.elastic.engine" in child.cmdline()]
    if len(engines) != 1:
        return set()
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        below = engines[0].children(recursive=True)
        return {engines[0], *(process for process in below if os.getsid(process.pid) == engines[0].pid)}
    return set()


def _idle_forkserver() -> set[psutil.Process]:
    """What `warm_start` forks from; its forks have the same command, but another parent."""
    children = _living_children(psutil.Process())
    return {child for child in children if "multiprocessing.forkserver" in " ".join(child.cmdline())}


def _living_children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]
    return []


def _ours_since(before: set[int]) -> set[psutil.Process]:
    """Processes that carry this session's mark, wherever they have been reparented, but those that idle on purpose.

    Args:
        before: Numbers of the processes that were there already.
    """
    ours = set()
    for pid in set(psutil.pids()) - before:
        try:
            process = psutil.Process(pid)
            if process.environ().get(_MARK) == _SESSION:
                command = " ".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and not any(s in command for s in _SESSION_PROCESSES):
                    ours.add(process)
        except psutil.Error:
            continue
    return ours - _idle_engine() - _idle_forkserver() if ours else ours


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid} (gone by now)"


def _listening_ports() -> set[int]:
    """The TCP ports this process listens on, asked of its own descriptors: the kernel lists the whole machine's."""
    ports = set()
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            found = socket.socket(fileno=descriptor)  # fails if it is none
            try:
                if found.family != socket.AF_UNIX and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    ports.add(found.getsockname()[1])
            finally:
                found.detach()
    return ports


class Workers(LoadScopeScheduling):
    """With several workers: a file stays with one of them (its fixtures are made once), as do all files with hosts."""

    def _split_scope(self, nodeid: str) -> str:
        return "network" if nodeid.startswith(_NETWORKED) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Workers:
    """Give each worker what must stay together."""
    return Workers(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--quick``."""
    parser.addoption("--quick", action="store_true", help="only tests in files that start no process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no worker is left alone with it at the end."""
    if config.getoption("--quick"):
        starting = {path for path in {item.path for item in items} if _STARTS.search(path.read_text(encoding="utf-8"))}
        config.hook.pytest_deselected(items=[item for item in items if item.path in starting])
        items[:] = [item for item in items if item.path not in starting]
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not item.nodeid.startswith(_NETWORKED), item.path not in long))  # stable


RunCli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCli:
    """Run ``python run.py ARGS`` in a fresh folder as a user would; returns the finished process with its output."""

    def run(
        *args: str, timeout_s: float = 200, env: dict[str, str] | None = None, program: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = [*(program or (sys.executable, str(ROOT / "run.py"))), *args]
        return warm_start.run(command, timeout_s=timeout_s, cwd=tmp_path, env=cli_environment() | (env or {}))

    return run


@pytest.fixture
def start_cli(tmp_path: Path) -> Iterator[Callable[..., warm_start.Started]]:
    """Start ``python run.py ARGS`` in a session of its own and return it running; ended with the test."""
    started: list[warm_start.Started] = []

    def start(*args: str, env: dict[str, str] | None = None) -> warm_start.Started:
        command = [sys.executable, str(ROOT / "run.py"), *args]
        started.append(warm_start.start(command, cwd=tmp_path, env=cli_environment() | (env or {})))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        output, _ = process.communicate()
        print(f"--- output of pid {process.pid} ---\n{output}")  # pytest shows it if the test failed


def nightly(*values: object) -> Any:
    """One set of a test's parameters that only `make nightly` asks for: another set asks by day."""
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.fixture
def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cli_environment() -> dict[str, str]:
    """This process's environment, with the test apps importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
