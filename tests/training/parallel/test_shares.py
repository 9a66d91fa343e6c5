"""A global batch that the ranks share unevenly is the same global batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import shared
import tiny

import everyrank
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import ConfigError, DataError
from everyrank.training.config import read_config
from everyrank.training.parallel.shares import shares_of_speeds, worth_it

KEYS: dict[str, Any] = {"num_epochs": 2, "accumulation_steps": 2, "clip_grad_norm": 0.5}
MEASURED: dict[str, Any] = {"num_epochs": 3, "model": shared.Slow, "parallel": {"shares": "measured"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "even": KEYS,
    "three to one": {**KEYS, "parallel": {"shares": [3, 1]}},
    "all to one": {**KEYS, "parallel": {"shares": [1, 1000]}},
    "measured": MEASURED,
    "measured again": {**MEASURED, "folder": "measured"},
    "wrong length": {**KEYS, "parallel": {"shares": [3, 1, 1]}},
    # One run: an epoch and a half, then to the end with another split.
    "begun": {**KEYS, "num_epochs": None, "num_steps": 8, "folder": "resumed", "parallel": {"shares": [3, 1]}},
    "resumed": {**KEYS, "num_epochs": None, "num_steps": 12, "folder": "resumed", "parallel": {"shares": [1, 2]}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What came of each variant on two ranks; the first, and what was resumed, on one as well."""
    folder = tmp_path_factory.mktemp("shares")
    return folder, everyrank.launch(shared.train, folder, VARIANTS, nproc_per_node=2)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    losses = max(abs(a - b) for (_, a), (_, b) in zip(one["steps"], other["steps"], strict=True))
    return max([losses, *((one["weights"][n] - other["weights"][n]).abs().max().item() for n in one["weights"])])


def test_any_split_takes_the_same_steps(found: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = found
    alone = everyrank.launch(shared.train, folder / "alone", {"even": KEYS}, nproc_per_node=1)[0]["even"]
    assert ranks[0]["even"]["counts"] == [5] * 10 + [2]
    assert [rank["three to one"]["counts"] for rank in ranks] == [[8] * 10 + [2], [2] * 10 + [1]]
    assert [rank["all to one"]["counts"] for rank in ranks] == [[0] * 11, [10] * 10 + [3]]
    for name in ("even", "three to one", "all to one"):
        assert distance(ranks[0][name], ranks[1][name]) == 0
        assert distance(ranks[0][name], alone) < 1e-12
        assert ranks[0][name]["validation"][-1]["loss"] == pytest.approx(alone["validation"][-1]["loss"], abs=1e-12)


def test_a_run_goes_on_under_another_split(found: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = found
    assert distance(ranks[0]["resumed"], ranks[0]["even"]) < 1e-12
    assert [rank["resumed"]["counts"][0] for rank in ranks] == [3, 7]
    for epoch in (0, 1):
        used = Counter(
            i for e in everyrank.read_ledger(folder / "resumed" / "ledger") if e["epoch"] == epoch for i in e["samples"]
        )
        assert used == Counter(range(103))


def test_the_fast_rank_is_given_more_once_it_is_measured(found: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = found
    shares = [rank["measured"]["shares"] for rank in ranks]
    assert shares[0] == shares[1]
    assert shares[0][0] > 0.6
    counts = [rank["measured"]["counts"][0] for rank in ranks]
    assert sum(counts) == 10
    assert [rank["measured again"]["shares"] for rank in ranks] == shares, "a run goes on with the shares it has"
    assert min(counts) > 0, "a rank without samples could not be measured again"
    assert "by its measured speed: rank 0: " in (folder / "measured" / "logs" / "rank-0.log").read_text()
    used = Counter(i for e in everyrank.read_ledger(folder / "measured" / "ledger") for i in e["samples"])
    assert used == Counter(dict.fromkeys(range(103), 3))


def test_a_list_of_the_wrong_length_is_one_error_before_training(found: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = found
    for rank in ranks:
        assert rank["wrong length"] == (
            "parallel.shares is [3.0, 1.0, 1.0], which is for 3 ranks, but the run has 2. Fix: give 2 numbers, or set "
            "it to measured or even."
        )
    assert not (folder / "wrong length").exists()


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"shares": "mesured"}, "Did you mean 'measured'"),
        ({"shares": [1, 0]}, "a list of positive numbers, one for each rank"),
        ({"shares": []}, "a list of positive numbers, one for each rank"),
        ({"shares": [1, True]}, "a list of positive numbers, one for each rank"),
        ({"shares": [1, 2], "local_updates": {}}, "with parallel.local_updates each rank takes steps of its own"),
        ({"shares": "measured", "strategy": "fsdp2"}, "forward pass gathers parameters"),
    ],
)
def test_what_cannot_be_shared_by_is_told(tmp_path: Path, parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config({**tiny.make_config(tmp_path), "parallel": parallel})


@pytest.mark.parametrize("shares", [None, [1, 1, 1], [3, 1, 2], [0.2, 5, 0.001]])
def test_ranks_cover_each_batch_once(shares: list[float] | None) -> None:
    ranks = [GlobalBatchSampler(1003, global_batch_size=17, rank=n, world_size=3, shares=shares) for n in range(3)]
    for batch in range(len(ranks[0])):
        parts = [rank.share(batch) for rank in ranks]
        assert parts[0].start == parts[0].global_start
        assert parts[-1].stop == parts[0].global_stop
        assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
        for part, share in zip(parts, shares or [1] * 3, strict=True):
            assert abs(part.num_local - part.num_global * share / sum(shares or [1] * 3)) <= 1
    with pytest.raises(DataError, match="it must be one positive number for each"):
        ranks[0].set_shares([1, 2])


def test_shares_follow_speeds_but_not_noise() -> None:
    assert shares_of_speeds([300.0, 100.0], 100) == [0.75, 0.25]
    for speeds in ([1e6, 1.0], [1e6, 1.0, 1.0, 1e5]):
        shares = shares_of_speeds(speeds, 8)
        assert sorted(shares, reverse=True) == [shares[speeds.index(speed)] for speed in sorted(speeds, reverse=True)]
        ranks = [
            GlobalBatchSampler(8, global_batch_size=8, rank=n, world_size=len(speeds), shares=shares)
            for n in range(len(speeds))
        ]
        assert min(rank.share(0).num_local for rank in ranks) > 0
    assert worth_it([1, 1], [0.75, 0.25])
    assert not worth_it([0.5, 0.5], [0.51, 0.49])
    assert not worth_it([0.5, 0.5], [1.0, 0.0]), "every rank has a part"
