"""How a run ends: its exit code, what it says last, and what signals do to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import WAITS, rank_pids, wait_gone
from warm_start import Started

from conftest import nightly

StartCli = Callable[..., Started]


def ends(how: str) -> tuple[str, ...]:
    return ("app=custom", "app._target_=probe_apps.EndsOnRank1", f"+app.how={how}")


@pytest.mark.parametrize("driver", ["torchrun", nightly("spawn"), "launch"])
def test_a_mistake_that_one_rank_found_ends_with_2_and_names_it(run_cli: Callable[..., Any], driver: str) -> None:
    done = run_cli(f"driver={driver}", *ends("mistake"))
    assert done.returncode == 2, done.stderr
    assert "error: app.width=-1 was set on rank 1" in done.stderr
    assert "said by rank 1 of 2" in done.stderr
    assert "rank-1.log" in done.stderr


def test_the_text_of_an_exit_reaches_the_user(run_cli: Callable[..., Any]) -> None:
    done = run_cli("driver=torchrun", *ends("exit"))
    assert done.returncode == 1
    assert "the disk is missing" in done.stderr


@pytest.mark.parametrize("driver", ["torchrun", "spawn", nightly("launch")])
def test_sigquit_shows_the_stacks_of_all_ranks_and_the_run_goes_on(
    start_cli: StartCli, tmp_path: Path, driver: str
) -> None:
    process = start_cli(f"driver={driver}", *WAITS)
    pids = rank_pids(tmp_path / "told")
    process.send_signal(signal.SIGQUIT)
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:  # bounded by the test's timeout
        seen += line.count("probe_apps.py")  # two ranks that write at once can share a line
        if seen >= 2:
            break
    assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    process.send_signal(signal.SIGHUP)  # the terminal is closed
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert wait_gone(pids) == []


def test_nohup_keeps_a_run_alive(start_cli: StartCli, tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to the program
    try:
        process = start_cli("driver=torchrun", *WAITS)
    finally:
        signal.signal(signal.SIGHUP, previous)
    pids = rank_pids(tmp_path / "told")
    for pid in (process.pid, *pids):
        os.kill(pid, signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
