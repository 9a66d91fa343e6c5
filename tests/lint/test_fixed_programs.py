"""After --fix an old script starts under every launcher, and has each sample once in an epoch's new order."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm_start

from conftest import cli_environment, nightly
from everyrank.cli.main import main

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return shutil.copy(PROGRAMS / "old_style.py", tmp_path / "train.py")


def _start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in cli_environment().items() if key not in ("RANK", "WORLD_SIZE")}
    return warm_start.run([sys.executable, *command], cwd=folder, env=environment, timeout_s=200)


def _launchers(folder: Path) -> dict[str, tuple[list[str], int]]:
    """The commands before the program, and the world size that each makes."""
    launch = ["-m", "torch.distributed.launch", "--standalone", "--nproc-per-node=2"]
    return {
        "python": ([], 1),
        "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={folder}"], 2),
        "launch": ([*launch, f"--log-dir={folder}"], 2),
        "launch --use-env": ([*launch, "--use-env", f"--log-dir={folder}"], 2),
        **{
            f"run driver={driver}": (["-m", "everyrank", "run", f"driver={driver}", "driver.nproc_per_node=2", "--"], 2)
            for driver in ("torchrun", "launch", "spawn")
        },
        "spawn": ([str(PROGRAMS / "as_rank.py")], 2),
    }


def test_as_it_was_it_starts_under_none(program: Path) -> None:
    done = _start(["train.py"], program.parent)
    assert done.returncode != 0
    assert "--local_rank" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "python",
        "run driver=torchrun",
        *map(nightly, ("launch", "torchrun", "launch --use-env", "spawn", "run driver=launch", "run driver=spawn")),
    ],
)
def test_after_fix_it_starts_under_every_launcher(
    launcher: str, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--fix", str(program)]) == 1  # that the group is never left has an unsafe fix
    left = capsys.readouterr().out
    assert "ER104" in left
    assert left.splitlines()[-1].startswith("1 file checked, 9 mended, 1 finding;")
    assert main(["check", "--fix", "--unsafe", str(program)]) == 0
    command, world_size = _launchers(program.parent)[launcher]
    done = _start([*command, "train.py"], program.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((program.parent / "result.json").read_text())
    assert (result["world_size"], result["local_rank"]) == (world_size, 0)
    first, second = result["orders"]
    assert len(set(first)) == 32 // world_size
    assert first != second  # set_epoch: each epoch has an order of its own
