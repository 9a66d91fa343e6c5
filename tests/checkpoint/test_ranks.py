"""Several ranks save, fail and load as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "programs" / "ranks.py"


def run_ranks(tmp_path: Path, world_size: int, what: str) -> list[dict]:
    meeting = tmp_path / f"meeting-{what}-{world_size}"
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(world_size), meeting, tmp_path / "checkpoints", what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


def test_three_ranks_save_and_two_load(tmp_path: Path) -> None:
    saved = run_ranks(tmp_path, 3, "save")
    assert saved[0] == saved[1] == saved[2], "every rank gets the same answers and the same errors"
    assert saved[0]["latest"] == 2
    assert "'odd'" in saved[0]["refused"]
    for when in ("background", "foreground"):
        assert "could not be written" in saved[0][when]
    loaded = run_ranks(tmp_path, 2, "load")
    assert loaded[0] == loaded[1]
    refused = loaded[0].pop("refused")
    assert "model.safetensors has 0 bytes" in refused
    assert loaded[0] == {
        "step": 2,
        "weight": 20.0,
        "state": {"rank": 0},
        "rank_states": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        "world_size": 3,
    }


def test_parameters_spread_by_fsdp_are_saved_whole(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, 2, "shard") == [{"same": True, "local": True}] * 2
