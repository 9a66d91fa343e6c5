"""The two documented usages of TrainerDDP run as they stand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import warm_start

from conftest import nightly

ROOT = Path(__file__).parent.parent.parent
STANDALONE = ROOT / "examples" / "train_ddp_standalone.py"
UNDER_A_LAUNCHER = ROOT / "examples" / "train_ddp_torchrun.py"


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return warm_start.run([sys.executable, *map(str, command)], env=environment, timeout_s=120)


def results(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if "seconds" not in key} for row in rows]


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("examples") / "spawned"
    done = run(STANDALONE, "--path", folder, "--master-port", free_port())
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_a_script_that_spawns(spawned: tuple[Path, str]) -> None:
    folder, printed = spawned
    assert "INFO everyrank.training: Training set size: 800" in printed
    assert "Validation: loss=" in printed
    assert "[RANK 1]" not in printed
    made = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "history.jsonl", "curves.png", "checkpoints", "logs"} <= made
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    rows = results(folder)
    assert rows[-1]["kind"] == "test"
    assert rows[-1]["accuracy"] > 0.8
    assert rows[-1]["num_samples"] == 100


@pytest.mark.parametrize(
    "launcher",
    [
        ("everyrank", "torchrun", "--standalone", "--nproc_per_node=2"),
        nightly(("torch.distributed.run", "--standalone", "--nproc_per_node=2")),
        nightly(("torch.distributed.launch", "--nproc_per_node=2", "--master-addr=127.0.0.1", "--master-port=PORT")),
    ],
    ids=["everyrank torchrun", "torchrun", "launch"],
)
def test_a_script_under_a_launcher_gives_the_same(
    tmp_path: Path, spawned: tuple[Path, str], launcher: tuple[str, ...]
) -> None:
    words = [free_port().join(word.split("PORT")) for word in launcher]
    done = run("-m", *words, f"--log-dir={tmp_path / 'launcher'}", UNDER_A_LAUNCHER, "--path", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run") == results(spawned[0])


def test_the_same_script_in_one_process_and_its_notice(tmp_path: Path) -> None:
    done = run(UNDER_A_LAUNCHER, "--path", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "parallel.world_size is 2 in the configuration, but this run's is 1, which wins" in done.stderr


def test_mistakes_end_the_script_before_a_process_is_started(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "train_ddp.yaml").read_text().replace("num_epochs: 5", "num_epoch: 5")
    (tmp_path / "bad.yaml").write_text(text)
    done = run(STANDALONE, "--config", tmp_path / "bad.yaml", "--path", tmp_path / "run")
    assert done.returncode != 0
    assert "training.num_epoch: unknown key. Did you mean 'num_epochs'?" in done.stderr
    assert not (tmp_path / "run").exists()
