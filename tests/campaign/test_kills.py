"""103 samples, global batches of 10, three epochs, killed anywhere and resumed: as if nothing had happened.

A launch is killed by SIGKILL inside a rank chosen at random, at a random call of the model in training or validation,
of the optimizer, or of the system calls that write and rename checkpoints and ledgers. After each kill the same run is
launched again. The uninterrupted one-process run is what it is compared with.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hurt_run
import pytest
import torch
from hurt_run import NUM_EPOCHS, NUM_SAMPLES, NUM_STEPS, RENAMING, WRITING, Harm

import everyrank
from conftest import nightly
from everyrank.checkpoint.checkpointer import read_checkpoint
from everyrank.checkpoint.folder import list_checkpoints
from everyrank.errors import RankFailedError

PRELOAD = ("everyrank.apps.train", "hurt_run")
PLACES = ("training", "optimizer", "validation", "writing", "renaming")
# How far into a launch a kill may come: three of them still leave the run unfinished, so that none is in vain.
LATEST = {"training": 9, "optimizer": 9, "validation": 2, "writing": 14, "renaming": 8}


def launch(run: Path, size: int, harm: Harm | None = None, **settings: Any) -> dict[str, Any]:
    return everyrank.launch(hurt_run.train, run, harm, nproc_per_node=size, preload=PRELOAD, kwargs=settings)[0]


@dataclass(frozen=True)
class Finished:
    """What a run left."""

    weights: dict[str, torch.Tensor]
    losses: list[float]

    @classmethod
    def of(cls, run: Path, result: dict[str, Any]) -> Finished:
        newest = list_checkpoints(run / "checkpoints")[-1]
        assert newest.verified
        assert newest.step == NUM_STEPS
        assert result["steps"] == list(range(1, NUM_STEPS + 1)), "each step has one line in the history"
        return cls(dict(read_checkpoint(newest.path).tensors["model"]), result["losses"])

    def difference(self, other: Finished) -> float:
        assert self.weights.keys() == other.weights.keys()
        return max((self.weights[name] - other.weights[name]).abs().max().item() for name in self.weights)


@dataclass(frozen=True)
class References:
    """Uninterrupted runs: one process, and two ranks with dropout."""

    one: Finished
    two: Finished


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    folder = tmp_path_factory.mktemp("references")
    one = Finished.of(folder / "one", launch(folder / "one", 1))
    return References(one, Finished.of(folder / "two", launch(folder / "two", 2, dropout=0.5)))


def draw(chance: random.Random, size: int, place: str | None = None) -> Harm:
    place = place or chance.choice(PLACES)
    count = chance.randint(1, LATEST[place])
    rank = 0 if place in ("writing", "renaming") else chance.randrange(size)
    call = {"writing": chance.choice(WRITING), "renaming": chance.choice(RENAMING)}.get(place, place)
    if call == "mkdir":
        count = chance.randint(3, 6)  # the first ones make the run's folders
    return Harm(call, count, rank, after=chance.random() < 0.5)


def killed(run: Path, size: int, harm: Harm, **settings: Any) -> None:
    with pytest.raises(RankFailedError) as failure:
        launch(run, size, harm, **settings)
    assert failure.value.rank == harm.rank
    assert "SIGKILL" in str(failure.value)
    durable = max((info.step for info in list_checkpoints(run / "checkpoints") if info.verified), default=0)
    assert all(int(file.stem[5:]) <= durable for file in (run / "ledger").glob("*.jsonl")), "committed, yet not durable"


def used_exactly_once(run: Path) -> bool:
    """Count every sample of the ledger by hand."""
    uses: Counter[tuple[int, int]] = Counter()
    for file in (run / "ledger").iterdir():
        assert file.suffix == ".jsonl", f"{file.name} is neither committed nor gone"
        for entry in map(json.loads, file.read_text().splitlines()):
            uses.update((entry["epoch"], sample) for sample in entry["samples"])
    return uses == Counter({(epoch, s): 1 for epoch in range(NUM_EPOCHS) for s in range(NUM_SAMPLES)})


def check_resized(references: References, run: Path, seed: int) -> None:
    """2 → 1 → 3 → 2 ranks, killed three times."""
    chance = random.Random(seed)
    harms = [draw(chance, size) for size in (2, 1, 3)]
    print(f"seed {seed}: {harms}")
    for size, harm in zip((2, 1, 3), harms, strict=True):
        # What one launch left half-written is not overwritten by chance: the next one saves at other steps.
        killed(run, size, harm, changes={"checkpoint_every_steps": chance.choice((1, 2))})
    finished = Finished.of(run, launch(run, 2))
    assert used_exactly_once(run)
    assert finished.difference(references.one) <= 1e-10
    assert finished.losses == pytest.approx(references.one.losses, abs=1e-10)


def check_unchanged_size(references: References, run: Path, seed: int) -> None:
    """Two ranks with dropout, killed twice, once in each of two different kinds of places."""
    chance = random.Random(seed)
    harms = [draw(chance, 2, place) for place in chance.sample(PLACES, 2)]
    print(f"seed {seed}: {harms}")
    for harm in harms:
        killed(run, 2, harm, dropout=0.5)
    finished = Finished.of(run, launch(run, 2, dropout=0.5))
    assert used_exactly_once(run)
    assert finished.difference(references.two) == 0
    assert finished.losses == references.two.losses


@pytest.mark.slow
def test_resized_2_1_3_2(references: References, tmp_path: Path) -> None:
    for seed in range(2):
        check_resized(references, tmp_path / str(seed), seed)


@pytest.mark.nightly  # by day a training that is killed twice: tests/training/test_resume.py
def test_unchanged_size_is_bitwise_equal(references: References, tmp_path: Path) -> None:
    for seed in range(2):
        check_unchanged_size(references, tmp_path / str(seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize("parity", [0, nightly(1)])
def test_before_or_after_a_call_of_each_place(references: References, tmp_path: Path, parity: int) -> None:
    places = (("validation", 2), ("write", 5), ("fsync", 5), ("rename", 3), ("replace", 3))
    for number, (place, count) in enumerate(places):
        run = tmp_path / place
        killed(run, 2, Harm(place, count, after=number % 2 == parity), dropout=0.5)
        finished = Finished.of(run, launch(run, 2, dropout=0.5))
        assert used_exactly_once(run)
        assert finished.difference(references.two) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2, 42))
def test_forty_more_seeds(references: References, tmp_path: Path, seed: int) -> None:
    check_resized(references, tmp_path / "resized", seed)
    check_unchanged_size(references, tmp_path / "unchanged", seed)
