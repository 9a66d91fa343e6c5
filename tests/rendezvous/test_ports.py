"""Ports: one that was asked for and is taken is named; one that was not asked for never conflicts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from warm_start import Started

from conftest import RunCli


@pytest.mark.parametrize("driver", ["torchrun", "spawn", "launch"])
def test_a_busy_port_is_named_with_the_cure(run_cli: RunCli, driver: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_cli(f"driver={driver}", f"driver.master_port={port}", "app=hello_dist")
    assert done.returncode == 2
    assert f"port {port} of this machine is in use" in done.stderr
    assert "a free port is then chosen" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Hello" not in done.stdout


def test_a_port_that_was_asked_for_is_used(run_cli: RunCli) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = run_cli("driver=torchrun", f"driver.master_port={port}", "app=hello_dist")
    assert done.returncode == 0, done.stderr
    assert f"127.0.0.1:{port}" in done.stdout + done.stderr


@pytest.mark.slow
def test_eight_runs_at_once_do_not_meet(start_cli: Callable[..., Started], tmp_path: Path) -> None:
    """The same command eight times in the same folder: eight ports, eight run folders."""
    processes = [start_cli("driver=torchrun", "app=hello_dist") for _ in range(8)]
    outputs = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs
    for output in outputs:
        assert output.count("[Rank 0] Sum of all ranks: 1\n") == 1
