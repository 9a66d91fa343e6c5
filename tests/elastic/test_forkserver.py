"""A forkserver that warms up a second one for the ranks of a later attempt."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import everyrank
from everyrank.elastic.forkserver import Forkserver, RankProcess

PROBE = """
import sys

def has_imported(name):
    sys.exit(0 if name in sys.modules else 3)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Forkserver]:
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "harmless.py").write_text("")
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    sys.path.insert(0, str(tmp_path))
    server = Forkserver()  # a copy of this process: it finds the modules
    yield server
    server.close()
    sys.path.remove(str(tmp_path))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exit_code(server: Forkserver, module: str) -> int:
    process = RankProcess(
        entry="probe:has_imported", args=(module,), env=dict(os.environ), cwd=os.getcwd(), sys_path=list(sys.path)
    )
    pid = server.fork(process, 1, 2)
    wait_until(lambda: server.wait(0.1) and pid in server.exit_codes)
    return server.exit_codes[pid]


def test_later_ranks_find_the_modules_imported(server: Forkserver) -> None:
    assert server.current is server
    server.warm_up(("harmless", "not_installed"))
    assert exit_code(server, "harmless") == 3, "the first one goes on as it was"
    wait_until(lambda: server.current is not server)
    assert exit_code(server.current, "harmless") == 0


def test_a_module_that_starts_a_thread_is_not_forked_from(server: Forkserver) -> None:
    server.warm_up(("threaded",))
    wait_until(lambda: server.wait(0.1) and len(server.exit_codes) == 1)
    assert server.current is server
    assert exit_code(server, "threaded") == 3


def wait_for_the_warm_one_and_die() -> tuple[str, bool]:
    """In the first attempt, wait until the ranks' forkserver has a child that is no rank of this group, and fail."""
    import psutil

    imported = "torch._dynamo" in sys.modules
    with everyrank.join(device="cpu") as world:
        if world.restart_count == 0:
            siblings = psutil.Process().parent()
            assert siblings is not None
            wait_until(lambda: len(siblings.children()) == 1 + world.world_size)
            os.abort()
        return str(world.restart_count), imported


def test_a_restarted_group_comes_from_a_forkserver(tmp_path: Path) -> None:
    results = everyrank.launch(wait_for_the_warm_one_and_die, nproc_per_node=2, max_restarts=1)
    assert [count for count, _ in results] == ["1", "1"]
