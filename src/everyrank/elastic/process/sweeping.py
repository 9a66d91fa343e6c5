"""A small process beside a run that ends what is left of it, also when the launching process is killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator

from everyrank.elastic.process import sweep


def new_mark() -> dict[str, str]:
    """The variable that marks every process of one launch."""
    return {sweep.MARK: uuid.uuid4().hex}


@contextlib.contextmanager
def swept(mark: str) -> Iterator[Callable[[Iterable[int]], None]]:
    """Leave no process with this mark behind, however the block or this process ends.

    Yields:
        A function that takes pids whose sessions are ended too: forked processes do not show a mark.
    """
    command = [sys.executable, "-I", "-S", sweep.__file__, mark]
    env = {name: value for name, value in os.environ.items() if name != sweep.MARK}
    read_end, write_end = os.pipe()
    open_ends = {write_end}

    def let_go() -> None:
        while open_ends:
            os.close(open_ends.pop())

    os.register_at_fork(after_in_child=let_go)  # else the sweeper would wait for a forked rank as well
    with open(read_end, "rb", closefd=True) as stdin:
        sweeper = subprocess.Popen(command, stdin=stdin, start_new_session=True, env=env)

    def add(pids: Iterable[int]) -> None:
        os.write(write_end, b"".join(b"%d " % pid for pid in pids))

    try:
        yield add
    finally:
        let_go()
        sweeper.wait()
