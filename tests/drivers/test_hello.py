"""hello_dist under every driver, at world sizes 1, 2 and 3, says what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import RunCli, nightly


def expected_lines(world_size: int, message: str = "Hello from distributed PyTorch!") -> list[str]:
    total = world_size * (world_size - 1) // 2
    lines = []
    for rank in range(world_size):
        lines += [f"[Rank {rank}/{world_size}] {message}", f"[Rank {rank}/{world_size}] Local rank: {rank}"]
    return [
        *lines,
        f"[Rank 0] Sum of all ranks: {total}",
        f"[Rank 0] Expected sum: {total}",
        "[Rank 0] ✓ Collective operation successful!",
        f"[Rank 0] All {world_size} processes completed successfully!",
    ]


@pytest.mark.parametrize(
    ("driver", "world_size"),
    [
        (["driver=local"], 1),
        ([], 1),
        nightly(["driver=spawn", "driver.nproc_per_node=3"], 3),
        (["driver=torchrun"], 2),
        (["driver=torchrun", "driver.nproc_per_node=3", "driver.start_method=fork"], 3),
        nightly(["driver=torchrun", "driver.nproc_per_node=1", "driver.start_method=spawn"], 1),
        nightly(["driver=launch"], 2),
        nightly(["driver=launch", "driver.use_env=true", "driver.nproc_per_node=1"], 1),
    ],
    ids=lambda value: "-".join(value).replace("driver", "").replace("=", "") if isinstance(value, list) else str(value),
)
def test_every_driver_greets_from_every_rank(
    run_cli: RunCli, tmp_path: Path, driver: list[str], world_size: int
) -> None:
    done = run_cli(*driver, "env=local", "app=hello_dist")
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert [line for line in expected_lines(world_size) if line not in printed] == []
    pids = re.findall(r"^\[Rank (\d)/\d\] Process ID: (\d+)$", done.stdout, re.MULTILINE)
    assert {rank for rank, _ in pids} == {str(rank) for rank in range(world_size)}
    assert len({pid for _, pid in pids}) == world_size
    logs = sorted(path.name for path in tmp_path.glob("outputs/*/logs/rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(world_size)]
    for rank in range(world_size):
        text = next(tmp_path.glob(f"outputs/*/logs/rank-{rank}.log")).read_text()
        assert f"[Rank {rank}/{world_size}] Hello from distributed PyTorch!" in text


def test_message_is_configurable_and_multirun_runs_each(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("-m", "driver=torchrun", "driver.nproc_per_node=1,2", "app=hello_dist", "app.message=Salut")
    assert done.returncode == 0, done.stderr
    for world_size in (1, 2):
        printed = done.stdout.splitlines()
        assert [line for line in expected_lines(world_size, "Salut") if line not in printed] == []
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_wrong_sum_is_a_failure(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "broken_hello.py").write_text(
        "from everyrank.apps import hello_dist\n"
        "class Broken(hello_dist.HelloDist):\n"
        "    def run(self, cfg):\n"
        "        hello_dist.reduce_sum = lambda value: value + 41\n"
        "        return super().run(cfg)\n"
    )
    done = run_cli("driver=torchrun", "app=hello_dist", "app._target_=broken_hello.Broken")
    assert done.returncode == 1
    assert "as the sum of all ranks, expected 1" in done.stderr


def test_the_log_of_every_rank_is_whole_and_says_each_thing_once(run_cli: RunCli, tmp_path: Path) -> None:
    """Rank 1's INFO lines stay off the console but are in its log; nothing is in a log twice."""
    done = run_cli("driver=torchrun", "app=hello_dist")
    for rank in (0, 1):
        log = next(tmp_path.glob(f"outputs/*/logs/rank-{rank}.log")).read_text()
        assert log.count(f"joined as rank {rank} of 2") == 1
        assert log.count(f"[Rank {rank}/2] Process ID") == 1
    assert "joined as rank 0 of 2" in done.stdout + done.stderr
    assert "joined as rank 1 of 2" not in done.stdout + done.stderr
