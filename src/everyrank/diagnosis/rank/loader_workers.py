"""What the workers of a DataLoader do: their stacks, and the samples they hold, without a thread in them.

A worker that is forked from a rank inherits the rank's signal handlers and their file: asked by a signal, it prints its
Python stack there even while it is stuck in C, and the samples it was given as soon as Python runs again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from types import FrameType
from typing import Any, TextIO

from everyrank.diagnosis.frames import parse_stack, where
from everyrank.diagnosis.proc import catches, children_of, look_at

# A real-time signal: nobody's default, and no launcher's, scheduler's or library's.
STACKS_SIGNAL = int(signal.SIGRTMIN) + 9 if hasattr(signal, "SIGRTMIN") else 0
_SAMPLES = re.compile(r"^everyrank: worker (\d+) holds samples (.*)$", re.MULTILINE)
_NUM_LOOKS, _LOOK_S = 15, 0.02  # looks are counted, not seconds: a machine that slept has not looked


def answer_with_samples(file: TextIO) -> None:
    """Make this process print its stack to ``file`` when a signal asks, and workers forked from it samples as well."""

    def samples(_signum: int, frame: FrameType | None) -> None:
        held = None
        while frame is not None and held is None:
            if frame.f_code.co_name == "_worker_loop":
                held = frame.f_locals.get("index")
            frame = frame.f_back
        if held is not None:
            os.write(file.fileno(), f"everyrank: worker {os.getpid()} holds samples {str(held)[:400]}\n".encode())

    def as_worker() -> None:
        faulthandler.unregister(STACKS_SIGNAL)
        signal.signal(STACKS_SIGNAL, samples)
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=False, chain=True)

    # Underneath the signal is ignored: a question that comes when the interpreter has ended must not end the process.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=False)  # system calls go on where they were
    os.register_at_fork(after_in_child=as_worker)


def workers_of(pid: int, path: str) -> list[dict[str, Any]]:
    """What each child of a process that answers such a signal does.

    Args:
        pid: The rank.
        path: The file to which they print.

    Returns:
        For each: ``pid``, ``state`` (see :mod:`proc`), ``cpu_s``, ``where`` and ``samples``, as far as it answered.
    """
    found = []
    for child in children_of(pid):
        facts = look_at(child)
        if facts is None:
            continue
        text = ask_for_stack(child, path) if facts.state not in "TtZ" else ""
        samples = _SAMPLES.search(text)
        found.append(
            {
                "pid": child,
                "state": facts.state,
                "cpu_s": facts.cpu_s,
                "where": where(parse_stack(text)),
                "samples": samples[2] if samples else None,
            }
        )
    return found


def ask_for_stack(pid: int, path: str) -> str:
    """Have a process print its stack to a file; returns that, or nothing if the question would end the process."""
    if not STACKS_SIGNAL or not catches(pid, STACKS_SIGNAL):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
        text = ""
        for look in range(_NUM_LOOKS):
            time.sleep(_LOOK_S)
            text += file.read()
            if _SAMPLES.search(text) or (text.count("\n") > 2 and look > _NUM_LOOKS // 2):
                break
    return text
