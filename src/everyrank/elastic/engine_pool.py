"""The engines of this process: one forked early by the command line, or spawned ones kept for the next launch."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from dataclasses import replace

from everyrank.diagnosis.outcome import Outcome
from everyrank.elastic.engine import Engine
from everyrank.elastic.process.surroundings import Surroundings
from everyrank.elastic.process.sweeping import new_mark
from everyrank.elastic.signals import forwarded
from everyrank.elastic.spec import EngineRun

_idle: list[Engine] = []
_lock = threading.Lock()


def fork_early() -> None:
    """Fork an engine now, so that it imports torch while this process reads its configuration.

    Only for a process that has one thread and no accelerator context, such as the command line at its start. Once is
    enough.
    """
    if _idle:
        return
    _give_back(Engine.fork())


def run(order: EngineRun) -> Outcome:
    """Run a launch on an idle engine (or a new one), passing on the signals that this process gets.

    Raises:
        KeyboardInterrupt: From a second Ctrl-C; every rank is gone.
    """
    order = replace(
        order,
        base_env=order.base_env or dict(os.environ),
        env={**order.env, **new_mark()},
        surroundings=Surroundings.here(),
    )
    engine = _take()
    with forwarded(lambda signum: engine.signal(signum), lambda: engine.close()) as told:
        try:
            outcome = engine.run(order)
            if outcome is None:
                engine.close()
                engine = Engine.spawn()
                outcome = engine.run(order)
        except BaseException as error:
            engine.close()  # nobody knows what it is doing, and nobody else has it
            if told.signum == signal.SIGINT and isinstance(error, Exception):
                raise KeyboardInterrupt from None
            raise
    _give_back(engine)
    assert outcome is not None  # a new engine holds nothing that could have been edited
    return outcome


def shutdown() -> None:
    """End the idle engines."""
    with _lock:
        while _idle:
            engine = _idle.pop()
            if engine.owner_pid == os.getpid():
                engine.close()


def _take() -> Engine:
    with _lock:
        while _idle:
            engine = _idle.pop()
            if engine.owner_pid == os.getpid() and engine.alive:
                return engine
    atexit.register(shutdown)
    return Engine.spawn()


def _give_back(engine: Engine) -> None:
    atexit.register(shutdown)
    with _lock:
        _idle.append(engine)
