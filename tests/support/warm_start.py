"""Starts Python programs as forks of a process that has imported torch: that import is most of what a start costs.

Each worker has one such process, the standard library's forkserver. It imports packages, and the modules of everyrank
that most commands use, but installs none of its cures: a fork may be torch's own launcher. The program is imported by
each start, and where a fork would not obey the environment that is asked for, a fresh interpreter starts. Tests that
ask about the start itself use ``subprocess``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver, process
from multiprocessing.connection import Connection
from typing import TextIO

from everyrank.elastic.process.fresh import as_if_fresh, read_too_early
from everyrank.elastic.process.leaving import finish
from everyrank.elastic.process.surroundings import Surroundings
from everyrank.program.main_module import run_module, run_script

# What the command line and its ranks import when they are used is named as well.
_IMPORTED = [
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "warm_start",
    "warm_grammar",
    *(f"everyrank.{name}" for name in ("cli.launching", "drivers.torchrun", "elastic.engine", "elastic.agent")),
    *(f"everyrank.{name}" for name in ("elastic.entry", "elastic.execute", "worker", "apps.hello_dist", "apps.train")),
]
_NAMESPACES = {"uts": "uts", "net": "net", "mount": "mnt"}  # as nsenter and as /proc have them, the last one last
_MAIN_PROCESS = multiprocessing.current_process()  # in a fork: that of the process it is a fork of
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class _Order:
    """What a fork becomes: the arguments of ``python``, and what a process inherits from the one that starts it."""

    arguments: list[str]
    cwd: str
    env: dict[str, str]
    sys_path: list[str]
    surroundings: Surroundings
    host: int | None


class Forked:
    """A running fork; the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, command: Sequence[str], order: _Order, separate: bool) -> None:
        ends = [os.pipe() for _ in range(1 + separate)]
        theirs = [Connection(write, readable=False) for _, write in ends]
        self.args = command
        self._process = _context.Process(target=_become, args=(order, theirs))
        self._process.start()
        for connection in theirs:
            connection.close()
        self._streams = [os.fdopen(read, encoding="utf-8") for read, _ in ends]
        self.stdout = self._streams[0]
        self._readers: list[_Reader] = []
        self.pid = self._process.pid
        assert self.pid is not None

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, ...]:
        """What it writes from now on, until nobody can write any more: output, and errors if they are apart."""
        if not self._readers:
            self._readers = [_Reader(stream) for stream in self._streams]
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return self._readers[0].said, self._readers[-1].said

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _Reader(threading.Thread):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(daemon=True)
        self._stream, self.said = stream, ""
        self.start()

    def run(self) -> None:
        with self._stream:
            self.said = self._stream.read()


Started = subprocess.Popen[str] | Forked


def start(
    command: Sequence[str],
    *,
    cwd: str | os.PathLike[str] = ".",
    env: Mapping[str, str] = os.environ,
    separate: bool = False,
    host: int | None = None,
) -> Started:
    """Start ``python SCRIPT ...`` or ``python -m MODULE ...``, in a session of its own, with nothing on standard input.

    Args:
        command: The interpreter, its script and the script's arguments.
        cwd: Its working directory.
        env: Its environment.
        separate: Whether errors have a pipe of their own; else they are among the output.
        host: A process whose network, host name and mounts it has; None for those of this process.
    """
    if _forks(command, env):
        arguments = list(command[1:])
        path = [*_python_path(env), *_fresh_path()]
        order = _Order(arguments, os.path.abspath(cwd), dict(env), path, replace(Surroundings.here(), argv=()), host)
        return Forked(command, order, separate)
    return subprocess.Popen(
        command if host is None else on_host(host, command, cwd),
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if separate else subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def on_host(host: int, command: Sequence[str], cwd: str | os.PathLike[str]) -> list[str]:
    """A command as it is started on a host, see ``start``; the process keeps its pid through all of it."""
    enter = ["nsenter", f"--target={host}", *(f"--{name}" for name in _NAMESPACES), "--"]
    return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *command]


def run(
    command: Sequence[str], *, timeout_s: float, cwd: str | os.PathLike[str] = ".", env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Start a program as ``start`` does, and wait for its end."""
    process = start(command, cwd=cwd, env=env, separate=True)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(command), process.returncode, stdout, stderr)


def _forks(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether a fork is as good: it runs no ``sitecustomize``, and obeys no variable that is read at the start."""
    python, first, *_ = command
    is_program = first == "-m" or first.endswith(".py")
    starts_plain = not any(os.path.exists(os.path.join(folder, "sitecustomize.py")) for folder in _python_path(env))
    is_obeyed = not read_too_early(_at_start(), env)
    return sys.platform == "linux" and python == sys.executable and is_program and starts_plain and is_obeyed


@functools.cache
def _at_start() -> dict[str, str]:
    """The environment in which the process that is forked starts, before the first of its forks."""
    environment = dict(os.environ)
    os.environ["PYTHONPATH"] = os.path.dirname(__file__)  # where it finds what to import
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return environment


def _python_path(env: Mapping[str, str]) -> list[str]:
    return [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]


@functools.cache
def _fresh_path() -> list[str]:
    """``sys.path`` of an interpreter that nobody has told where else to look."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import sys; print(*sys.path[1:], sep='\\n')"
    return subprocess.check_output([sys.executable, "-c", code], env=env, text=True).splitlines()


def _become(order: _Order, outputs: list[Connection]) -> None:
    """Be the program, from its arguments to its end; never returns."""
    gc.freeze()  # else the first full collection visits, and so copies, every object that came with torch
    os.setsid()
    if order.host is not None:
        for namespace in _NAMESPACES.values():
            with open(f"/proc/{order.host}/ns/{namespace}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
                    raise OSError(ctypes.get_errno(), f"no entrance to the host of process {order.host}")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(outputs[0].fileno(), 1)
    os.dup2(outputs[-1].fileno(), 2)
    for output in outputs:
        output.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(order.env)
    os.chdir(order.cwd)
    sys.path[:] = order.sys_path
    order.surroundings.enter()
    as_if_fresh()
    _be_the_main_process()
    try:
        if order.arguments[0] == "-m":
            run_module(order.arguments[1:])
        else:
            run_script(order.arguments)
    except BaseException as error:
        finish(error)
    finish(None)


def _be_the_main_process() -> None:
    """Undo what the standard library makes of a process it has started: its children would start in the same way."""
    process.__dict__.update(_current_process=_MAIN_PROCESS, _parent_process=None)
    _MAIN_PROCESS.name = "MainProcess"
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.set_forkserver_preload(["__main__"])


_context.set_forkserver_preload(_IMPORTED)
