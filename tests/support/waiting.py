"""Waiting for files and for processes to end, bounded."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

WAITS = ("app=custom", "app._target_=probe_apps.Waits", "+app.folder=told")


def wait_for(path: Path, timeout_s: float = 90) -> Path:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)
    return path


def rank_pids(folder: Path, world_size: int = 2) -> list[int]:
    wait_for(folder / "joined")
    return [int((folder / f"pid-{rank}").read_text()) for rank in range(world_size)]


def wait_gone(pids: list[int], timeout_s: float = 20) -> list[int]:
    """Pids that are still alive after the timeout (zombies do not count)."""
    deadline = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if _alive(pid)]:
        if time.monotonic() > deadline:
            return alive
        time.sleep(0.02)
    return []


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
