"""On one machine nothing listens beyond loopback while a run lives, by the kernel's own socket table."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from waiting import WAITS, rank_pids, wait_for
from warm_start import Started

import everyrank
from conftest import cli_environment, nightly

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def listening_addresses(pids: list[int]) -> set[str]:
    """Local addresses of the TCP sockets on which these processes listen."""
    found = set()
    for pid in pids:
        for connection in psutil.Process(pid).net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip)
    return found


def family(pid: int) -> list[int]:
    root = psutil.Process(pid)
    return [root.pid, *(child.pid for child in root.children(recursive=True))]


# The other drivers are asked by tests/cluster/test_scripts.py, rank by rank.
@pytest.mark.parametrize("driver", ["local", "torchrun", *map(nightly, ("spawn", "launch"))])
def test_a_run_listens_on_loopback_only(start_cli: Callable[..., Started], tmp_path: Path, driver: str) -> None:
    process = start_cli(f"driver={driver}", *WAITS)
    rank_pids(tmp_path / "told", 1 if driver == "local" else 2)
    addresses = listening_addresses(family(process.pid))
    assert addresses <= LOOPBACK
    if driver != "local":
        assert addresses, "a run of two ranks has a store: a test that sees no socket at all sees nothing"


def test_launch_listens_on_loopback_only(tmp_path: Path) -> None:
    folder = str(tmp_path)

    def waits() -> None:
        import pathlib
        import time

        with everyrank.join() as world:
            pathlib.Path(folder, f"pid-{world.rank}").write_text(str(os.getpid()))
            everyrank.barrier()
            pathlib.Path(folder, "joined").touch()
            while not pathlib.Path(folder, "go").exists():
                time.sleep(0.02)

    thread = threading.Thread(target=lambda: everyrank.launch(waits))
    thread.start()
    wait_for(tmp_path / "joined")
    addresses = listening_addresses(family(os.getpid()))
    (tmp_path / "go").touch()
    thread.join(60)
    assert addresses
    assert addresses <= LOOPBACK


@pytest.mark.nightly
def test_bare_torchrun_does_listen_on_every_address(tmp_path: Path) -> None:
    """The rival, seen by the same eyes: otherwise the tests above might be blind."""
    script = tmp_path / "bare.py"
    script.write_text(
        "import os, pathlib, time, torch.distributed as dist\n"
        "dist.init_process_group('gloo'); dist.barrier()\n"
        "folder = pathlib.Path(os.environ['FOLDER'])\n"
        "dist.barrier(); (folder / 'joined').touch()\n"
        "while not (folder / 'go').exists(): time.sleep(0.02)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--log-dir={tmp_path / 'logs'}", str(script)]
    process = subprocess.Popen(command, env=cli_environment() | {"FOLDER": str(tmp_path)}, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "joined")
        assert not listening_addresses(family(process.pid)) <= LOOPBACK
    finally:
        (tmp_path / "go").touch()
        process.wait(timeout=60)
