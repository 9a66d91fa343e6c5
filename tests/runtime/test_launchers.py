"""Real launchers start a real program; it joins, and after a kill it joins again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import warm_start

from conftest import nightly

PROGRAM = """
import json, os, signal, sys
from pathlib import Path

import torch

import everyrank
from everyrank.launch_env.legacy_arguments import strip_legacy_arguments

folder, kill = strip_legacy_arguments(sys.argv[1:])[0]
with everyrank.join(timeout_s=60) as world:
    total = int(everyrank.reduce_sum(torch.tensor(world.rank)))
    attempt = world.restart_count
    if attempt < int(kill) and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    everyrank.barrier()
    seen = {
        "launcher": world.launcher, "rank": world.rank, "local_rank": world.local_rank,
        "size": world.world_size,
        "local_size": world.local_world_size, "num_nodes": world.num_nodes, "total": total, "attempt": attempt,
    }
    Path(folder, f"rank-{world.rank}.json").write_text(json.dumps(seen))
"""


def _launch(tmp_path: Path, *launcher: str, kill: int = 0) -> list[dict[str, Any]]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, *launcher, f"--log-dir={tmp_path / 'logs'}", str(program), str(tmp_path), str(kill)]
    done = warm_start.run(command, timeout_s=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]


def _expected(launcher: str, attempt: int = 0) -> list[dict[str, Any]]:
    shared = {"launcher": launcher, "size": 2, "local_size": 2, "num_nodes": 1, "total": 1, "attempt": attempt}
    return [shared | {"rank": rank, "local_rank": rank} for rank in range(2)]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LAUNCH = ("-m", "torch.distributed.launch", "--nproc-per-node=2")


@pytest.mark.nightly  # by day it is asked after a restart, below
def test_torchrun(tmp_path: Path) -> None:
    assert _launch(tmp_path, *TORCHRUN) == _expected("torchrun")


@pytest.mark.nightly  # by day torch's old launcher restores video: tests/apps/video_restoration/test_launch.py
def test_launch(tmp_path: Path, free_port: int) -> None:
    assert _launch(tmp_path, *LAUNCH, f"--master-port={free_port}") == _expected("launch")


@pytest.mark.nightly
def test_launch_with_use_env_is_torchrun(tmp_path: Path, free_port: int) -> None:
    assert _launch(tmp_path, *LAUNCH, "--use-env", f"--master-port={free_port}") == _expected("torchrun")


@pytest.mark.slow
@pytest.mark.parametrize("num_restarts", [1, nightly(2)])
def test_a_restart_never_meets_the_addresses_of_the_dead(tmp_path: Path, num_restarts: int) -> None:
    """Torch 2.13 keeps the agent's store through restarts; plain init_process_group reads dead addresses from it."""
    found = _launch(tmp_path, *TORCHRUN, f"--max-restarts={num_restarts}", "--monitor-interval=0.1", kill=num_restarts)
    assert found == _expected("torchrun", attempt=num_restarts)


@pytest.mark.nightly
def test_a_restart_with_a_static_rendezvous(tmp_path: Path, free_port: int) -> None:
    static = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}")
    found = _launch(tmp_path, *static, "--max-restarts=1", "--monitor-interval=0.1", kill=1)
    assert found == _expected("torchrun", attempt=1)
