"""A signal to any process of a run: all ranks save the same step and leave, and nothing is trained on twice.

The signal is sent from inside a rank, in the middle of a training step, of validation, or of writing a checkpoint:
to that rank alone, to the launcher, to the launcher's process group, or to every process of the run at once (as Slurm's
scancel does, and where each must count as one request). Ranks load their data themselves, or with two workers each.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import hurt_run
import pytest
from hurt_run import NUM_EPOCHS, NUM_SAMPLES, NUM_STEPS, Harm

import everyrank
from campaign.starting import Start, start_command
from conftest import nightly
from everyrank.certification.evidence import Evidence

PRELOAD = ("everyrank.apps.train", "hurt_run")
GRACE_S = 30  # what Slurm leaves between its SIGTERM and its SIGKILL
SIGNALS = itertools.cycle(("SIGTERM", "SIGUSR1", "SIGINT", "SIGUSR2"))
PLACES = {"training": Harm("training", 6, rank=1), "validation": Harm("validation", 2), "saving": Harm("fsync", 9)}


def hurt(place: str, victim: str, name: str, times: int = 1) -> Harm:
    harm = PLACES[place]
    return Harm(harm.place, harm.count, harm.rank, name, victim, times=times)


def launch(run: Path, harm: Harm | None = None, num_workers: int = 0) -> list[dict[str, Any]]:
    changes = {"num_workers": num_workers}
    kwargs = {"changes": changes}
    return everyrank.launch(hurt_run.train, run, harm, nproc_per_node=2, preload=PRELOAD, kwargs=kwargs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    run = tmp_path_factory.mktemp("uninterrupted")
    launch(run)
    return Evidence.of(run)


def committed(run: Path) -> list[int]:
    entries = [json.loads(line) for file in (run / "ledger").glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted({entry["step"] for entry in entries})


def check_stopped(run: Path, steps: list[int]) -> int:
    """All ranks stopped at one step, which is the newest checkpoint's and the last one committed."""
    assert len(steps) == 2
    assert steps[0] == steps[1] == hurt_run.newest_step(run)
    assert committed(run) == list(range(1, steps[0] + 1))
    assert list((run / "ledger").glob("*.pending")) == []
    assert 0 < steps[0] < NUM_STEPS
    return steps[0]


def check_finished(run: Path, uninterrupted: Evidence, stopped: int, num_workers: int = 0) -> None:
    result = launch(run, num_workers=num_workers)[0]
    assert result["first"] == stopped, "it goes on from the step it stopped at"
    assert result["steps"] == list(range(1, NUM_STEPS + 1))
    evidence = Evidence.of(run)
    assert evidence.uses == {epoch: Counter(range(NUM_SAMPLES)) for epoch in range(NUM_EPOCHS)}
    assert evidence.difference(uninterrupted) == 0


@pytest.mark.slow
@pytest.mark.nightly  # by day from the command line, below
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_rank(tmp_path: Path, uninterrupted: Evidence, num_workers: int) -> None:
    for place, name in zip(PLACES, SIGNALS, strict=False):
        run = tmp_path / place
        results = launch(run, hurt(place, "rank", name), num_workers)
        stopped = check_stopped(run, [result["stopped"] for result in results])
        check_finished(run, uninterrupted, stopped, num_workers)


def check_from_the_command_line(
    start_cli: Start, folder: Path, uninterrupted: Evidence, victim: str, workers: dict[str, int]
) -> None:
    started = {}
    for (place, num_workers), name in zip(workers.items(), SIGNALS, strict=False):
        harm = hurt(place, victim, name)
        started[place] = harm, start_command(start_cli, harm, folder / place, num_workers)
    for place, (harm, process) in started.items():
        output, _ = process.communicate(timeout=60 + GRACE_S)
        assert process.returncode == 75, f"{harm}:\n{output}"
        run = folder / place
        stopped = check_stopped(run, [int(file.read_text()) for file in run.glob("stopped-*")])
        check_finished(run, uninterrupted, stopped, workers[place])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "workers"),
    [
        nightly("launcher", {"training": 0, "validation": 2, "saving": 0}),
        nightly("group", {"training": 2, "validation": 0, "saving": 2}),
        ("all", {"training": 2, "validation": 0, "saving": 2}),
    ],
)
def test_from_the_command_line(
    start_cli: Start, tmp_path: Path, uninterrupted: Evidence, victim: str, workers: dict[str, int]
) -> None:
    check_from_the_command_line(start_cli, tmp_path, uninterrupted, victim, workers)


@pytest.mark.nightly
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("victim", ["launcher", "group", "all"])
@pytest.mark.parametrize("repetition", range(4))  # each with other signals
def test_whole_matrix_from_the_command_line(
    start_cli: Start, tmp_path: Path, uninterrupted: Evidence, victim: str, num_workers: int, repetition: int
) -> None:
    check_from_the_command_line(start_cli, tmp_path, uninterrupted, victim, dict.fromkeys(PLACES, num_workers))


def test_ctrl_c_twice_ends_at_once(start_cli: Start, tmp_path: Path) -> None:
    process = start_command(start_cli, hurt("training", "launcher", "SIGINT", times=2), tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert not list((tmp_path / "run").glob("stopped-*"))
