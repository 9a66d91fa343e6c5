"""A loop of one's own survives kills and resizes: each sample once an epoch, the weights of one undisturbed process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import warm_start

from conftest import nightly

CAMPAIGN = Path(__file__).parent / "loop_campaign.py"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loop.py"


def run_campaign(folder: Path, seed: int, *attempts: object) -> tuple[dict, dict[str, torch.Tensor]]:
    folder.mkdir()
    done = warm_start.run(
        [sys.executable, str(CAMPAIGN), str(folder), str(seed), *map(str, attempts)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout_s=150,
    )
    logs = "".join(file.read_text() for file in folder.glob("rank-*.log"))
    assert done.returncode == 0, done.stderr + logs
    report = json.loads(done.stdout)
    assert report["exactly_once"], (report, logs)
    assert report["steps"], (report, logs)
    assert set(report["ends"][-1]) == {0}, (report, logs)
    return report, torch.load(folder / "model.pth", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of one process that nobody kills."""
    return run_campaign(tmp_path_factory.mktemp("undisturbed") / "run", 0, 1)[1]


def compare(folder: Path, seed: int, undisturbed: dict[str, torch.Tensor], *attempts: object) -> dict:
    report, weights = run_campaign(folder, seed, *attempts)
    assert any({-9, 75} & set(end) for end in report["ends"][:-1]), "nobody was killed"
    same = set(attempts) == {1}
    for name, tensor in undisturbed.items():
        difference = (weights[name] - tensor).abs().max()
        assert difference <= (0.0 if same else 1e-10), (name, difference, report)
    return report


@pytest.mark.parametrize("seed", [nightly(0), nightly(1), 2])
def test_kills_and_resizes_change_nothing(tmp_path: Path, seed: int, undisturbed: dict[str, torch.Tensor]) -> None:
    compare(tmp_path / "run", seed, undisturbed, 2, 1, 3, 2)


def test_at_one_world_size_the_weights_are_bitwise_equal(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    report = compare(tmp_path / "run", 6, undisturbed, 1, 1, 1)
    assert len(report["resumed_from"]) > 1


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    report = compare(tmp_path / "run", 0, undisturbed, "2t", "3t", 1)
    assert report["ends"] == [[75, 75], [75, 75, 75], [0]]
    assert len(report["resumed_from"]) == 3


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_kills_and_resizes_change_nothing(tmp_path: Path, seed: int, undisturbed: dict[str, torch.Tensor]) -> None:
    compare(tmp_path / "run", seed, undisturbed, 2, 1, 3, 2)


def test_it_takes_ten_lines() -> None:
    assert sum(line.endswith("# everyrank") for line in EXAMPLE.read_text().splitlines()) <= 10
