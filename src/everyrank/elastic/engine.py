"""The engine: the process that imports torch and runs torch's elastic agent on behalf of a process that has not.

The command line forks its engine before it reads the configuration, so that torch is imported meanwhile;
``everyrank.launch`` starts one as a fresh interpreter and keeps it for the next call. Either way torch is imported once
a machine, and the ranks are forked from that import.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing.util import _args_from_interpreter_flags  # type: ignore[attr-defined]
from typing import Any

from everyrank.diagnosis.outcome import Outcome
from everyrank.elastic import wire
from everyrank.elastic.lifetime import die_with_parent
from everyrank.elastic.process.leaving import finish_after
from everyrank.elastic.process.preloaded import Preloaded
from everyrank.elastic.spec import EngineRun
from everyrank.errors import EveryrankError, UserError
from everyrank.runtime import no_terminal, torch_cures

_TELL_AGAIN_S = 1.0


class Engine:
    """The launching process's handle on an engine."""

    def __init__(self, channel: socket.socket, pid: int, process: subprocess.Popen[bytes] | None) -> None:
        self._channel = channel
        self._process = process
        self._told: int | None = None
        self.pid = pid
        self.owner_pid = os.getpid()

    @classmethod
    def fork(cls) -> Engine:
        """Fork an engine from this process, which must have one thread and no accelerator context."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        parent_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            with contextlib.suppress(BaseException):
                die_with_parent(parent_pid)
                _serve(theirs)
            os._exit(0)
        theirs.close()
        return cls(ours, pid, None)

    @classmethod
    def spawn(cls) -> Engine:
        """Start an engine as a fresh interpreter: safe from any process, whatever threads it has."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        python = [sys.executable, *_args_from_interpreter_flags()]
        command = [*python, "-m", "everyrank.elastic.engine", str(theirs.fileno())]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, stdin=subprocess.DEVNULL)
        theirs.close()
        return cls(ours, process.pid, process)

    def run(self, run: EngineRun) -> Outcome | None:
        """Carry out one launch and wait for it; None if this engine holds modules that have been edited since.

        Raises:
            EveryrankError: The engine itself died.
        """
        self._told = None
        try:
            wire.send(self._channel, run, [1, 2])
            while not select.select([self._channel], [], [], _TELL_AGAIN_S)[0]:
                if self._told is not None:  # signals are ignored while it imports torch; sending one twice does no harm
                    self.signal(self._told)
            outcome, _ = wire.receive(self._channel)
        except (EOFError, OSError) as error:
            self.close()
            raise EveryrankError(f"the process that ran the ranks (pid {self.pid}) died; no rank is left") from error
        return outcome

    def signal(self, signum: int) -> None:
        """Pass a signal on to the engine, which passes it to the ranks."""
        self._told = signum
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    @property
    def alive(self) -> bool:
        """Whether the engine can take a run."""
        if self._process is not None:
            return self._process.poll() is None
        return True

    def close(self) -> None:
        """End the engine, and with it its forkserver and any rank. Once is enough."""
        if self._channel.fileno() < 0:
            return
        self._channel.close()
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        else:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def _serve(channel: socket.socket) -> None:
    """Answer runs until the launching process is gone."""
    # A session of its own: Ctrl-C in a terminal reaches the launching process, which passes it on exactly once, and
    # nothing here can be stopped because it reads the terminal.
    os.setsid()
    no_terminal.detach()
    at_start = dict(os.environ)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch_cures.install()
    _import_torch()
    from everyrank.elastic.forkserver import Forkserver

    at_import = _descriptors()
    forkserver = Forkserver([channel.fileno()])
    preloaded = Preloaded()
    threading.Thread(target=_watch, args=(channel,), daemon=True).start()
    while True:
        try:
            run, fds = wire.receive(channel)
        except (EOFError, OSError):
            break
        if preloaded.changed():
            wire.close_all(fds)
            wire.send(channel, None)  # a module cannot be imported anew: the next engine will
            break
        if run.start_method == "forkserver" and not preloaded.has(run.preload):
            forkserver.close()
            private = _descriptors() - at_import  # of this run, and of whatever else has begun here since
            preloaded.load(run.preload)
            forkserver = Forkserver([channel.fileno(), *private])
        if run.start_method == "forkserver":
            forkserver.prepare(run.entry)
        from everyrank.elastic.execute import execute  # while the forkserver imports

        run = _as_it_must_start(run, at_start, fds[1])
        wire.send(channel, _outcome(execute, run, forkserver, (fds[0], fds[1])))
        wire.close_all(fds)
    forkserver.close()


def _descriptors() -> set[int]:
    """The descriptors that are open now."""
    listed = {int(name) for name in os.listdir("/dev/fd")}
    return {fd for fd in listed if os.path.exists(f"/dev/fd/{fd}")}  # but for the listing's own


def _import_torch() -> None:
    import torch.distributed.elastic.agent.server.local_elastic_agent  # noqa: F401

    # The agent's running commentary repeats, rank by rank, what the outcome says once.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).disabled = True


def _as_it_must_start(run: EngineRun, at_start: dict[str, str], stderr: int) -> EngineRun:
    """Fork no rank whose variables a fork would not obey."""
    from everyrank.elastic.process.fresh import read_too_early

    names = read_too_early(at_start, {**run.base_env, **run.env})
    if run.start_method == "spawn" or not names:
        return run
    said = f"{', '.join(names)}: read only when a process starts, so the ranks are fresh interpreters, not forks"
    os.write(stderr, f"notice: {said}\n".encode())
    return replace(run, start_method="spawn")


def _watch(channel: socket.socket) -> None:
    """End this engine and its ranks when the launching process is gone in the middle of a run."""
    poller = select.poll()
    poller.register(channel, select.POLLRDHUP | select.POLLHUP)
    poller.poll()
    os._exit(1)


def _outcome(execute: Any, run: EngineRun, forkserver: Any, stdio: tuple[int, int]) -> Outcome:
    try:
        return execute(run, forkserver, stdio)
    except UserError as error:
        return Outcome(message=str(error), user_error=True)
    except Exception as error:
        return Outcome(message=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    finish_after(lambda: _serve(socket.socket(fileno=int(sys.argv[1]))))
