"""Ranks that step on their own and meet now and then: local SGD and DiLoCo, beside the same written out by hand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import apart
import pytest
import tiny
import torch

import everyrank
from conftest import nightly
from everyrank.checkpoint.folder import list_checkpoints
from everyrank.checkpoint.reading import read_checkpoint
from everyrank.errors import ConfigError, RankFailedError
from everyrank.training.config import read_config
from everyrank.training.saving.ledger import read_ledger

TOLERANCE = 1e-10
ADAM = {"optimizer_type": torch.optim.AdamW, "optimizer_kwargs": {"lr": 0.01, "weight_decay": 0.1}}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
DILOCO = {"kwargs": {"lr": 0.5, "momentum": 0.8, "nesterov": True}}
# 103 samples in batches of 10: 11 steps an epoch, shares that differ, syncs that do not fall on an epoch's end.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local": ({"num_epochs": 3}, {"every": 4}),
    "diloco": ({"num_epochs": 3, **ADAM}, {"every": 5, "outer_optimizer": DILOCO}),
    "default": ({"num_epochs": 2}, {"every": 3, "outer_optimizer": {}}),
    "warm": ({"num_epochs": 2}, {"every": 4, "start_step": 6, "outer_optimizer": DILOCO}),
    "options": ({"num_epochs": 2, "accumulation_steps": 4, "clip_grad_norm": 0.1, **ADAM}, {"every": 2}),
    "few": ({"num_epochs": 6, "num_samples": 2}, {"every": 2}),
}
BY_HAND: dict[str, dict[str, Any]] = {
    "local": {},
    "diloco": {"outer": (0.5, 0.8), **ADAM},
    "default": {"outer": (0.7, 0.9)},
    "warm": {"outer": (0.5, 0.8), "start": 6},
    "options": {"accumulation": 4, "clip": 0.1, **ADAM},
    "few": {"num_samples": 2},
}


def with_local(changes: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    return {**changes, "parallel": {"local_updates": local}}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every rank of every world size returned for every variant that is asked about there."""
    folder = tmp_path_factory.mktemp("apart")
    variants = {name: with_local(*variant) for name, variant in VARIANTS.items()}
    every_one = {"num_epochs": 2, "optimizer_kwargs": SGD}
    of_several = {"every_one": with_local(every_one, {"every": 1}), "plain": every_one}
    bf16 = {"bf16": with_local({"num_epochs": 3}, {"every": 4, "compress": "bf16"})}
    asked = {1: variants, 2: variants | of_several, 3: variants | of_several | bf16}
    return {size: everyrank.launch(tiny.train, folder / str(size), asked[size], nproc_per_node=size) for size in asked}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_loop_written_by_hand(results: Any, size: int, variant: str) -> None:
    changes, local = VARIANTS[variant]
    losses, state = apart.by_hand(size, every=local["every"], num_epochs=changes["num_epochs"], **BY_HAND[variant])
    for found in (rank[variant] for rank in results[size]):
        assert [loss for _, loss in found["steps"]] == pytest.approx(losses, abs=TOLERANCE)
        for name, value in state.items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=TOLERANCE)
            assert torch.equal(found["weights"][name], results[size][0][variant]["weights"][name]), "one model"


def test_one_rank_without_an_outer_optimizer_is_plain_training(results: Any, tmp_path: Path) -> None:
    (plain,) = everyrank.launch(tiny.train, tmp_path, {"plain": VARIANTS["local"][0]}, nproc_per_node=1)
    for name, value in plain["plain"]["weights"].items():
        assert torch.equal(results[1][0]["local"]["weights"][name], value)


@pytest.mark.parametrize("size", [2, 3])
def test_meeting_at_each_step_is_ddp_also_with_uneven_shares(results: Any, size: int) -> None:
    every_one, plain = results[size][0]["every_one"], results[size][0]["plain"]
    for name, value in plain["weights"].items():
        torch.testing.assert_close(every_one["weights"][name], value, rtol=0, atol=TOLERANCE)
    assert [loss for _, loss in every_one["steps"]] == pytest.approx([loss for _, loss in plain["steps"]])


def test_updates_in_bfloat16_are_close_and_the_same_on_all_ranks(results: Any) -> None:
    full, narrow = results[3][0]["local"]["weights"], results[3][0]["bf16"]["weights"]
    distances = [(full[name] - narrow[name]).abs().max().item() for name in full]
    assert 0 < max(distances) < 0.01
    for rank in (1, 2):
        assert all(torch.equal(narrow[name], results[3][rank]["bf16"]["weights"][name]) for name in narrow)


def test_the_moving_average_takes_in_the_model_of_a_meeting(tmp_path: Path) -> None:
    local = with_local({"num_epochs": 1, "ema": {"decay": 0.9}}, {"every": 11})
    everyrank.launch(tiny.train, tmp_path, {"ema": local}, nproc_per_node=2)
    _, state = apart.by_hand(2, every=11, num_epochs=1)
    everyrank.training.seeding.seed_everywhere(42)
    first = tiny.TinyNet().double().state_dict()
    checkpoint = read_checkpoint(list_checkpoints(tmp_path / "ema" / "checkpoints")[-1].path)
    for name, average in checkpoint.tensors["ema"].items():
        expected = first[name] + (1 - 0.9**11) * (state[name] - first[name])
        torch.testing.assert_close(average, expected, rtol=0, atol=TOLERANCE)
    assert checkpoint.state["ema"]["num_updates"] == 11


@pytest.mark.parametrize("outer", [None, {}])
def test_nothing_is_sent_between_two_meetings(tmp_path: Path, outer: Any) -> None:
    changes = with_local({"num_epochs": 2}, {"every": 4, "start_step": 3, "outer_optimizer": outer})
    for rank in everyrank.launch(apart.train_and_count, tmp_path, changes, False, nproc_per_node=2):
        counts = rank["counts"]
        assert len(counts) == 22
        grew = [number for number in range(1, 22) if counts[number] > counts[number - 1]]
        # each of the first 3 steps, the syncs after 7, 11, 15 and 19; 11 is the end of an epoch as well
        assert grew == [1, 2, 3, 7, 11, 15, 19]


def test_an_epochs_end_is_a_meeting_only_where_one_model_is_needed(tmp_path: Path) -> None:
    changes = with_local({"num_epochs": 2}, {"every": 8})
    met = [everyrank.launch(apart.train_and_count, tmp_path / str(v), changes, v, nproc_per_node=2)[0] for v in (0, 1)]
    _, without = apart.by_hand(2, every=8, num_epochs=2)  # which meets at each epoch's end
    torch.testing.assert_close(met[1]["weights"]["0.weight"], without["0.weight"], rtol=0, atol=TOLERANCE)
    assert (met[0]["weights"]["0.weight"] - without["0.weight"]).abs().max() > 1e-6


def test_batch_statistics_are_averaged_and_tables_stay(tmp_path: Path) -> None:
    first, second = everyrank.launch(apart.train_norms, tmp_path, nproc_per_node=2)
    for name in ("1.running_mean", "1.running_var"):
        assert not torch.equal(first["before"][name], second["before"][name])
        mean = (first["before"][name] + second["before"][name]) / 2
        for rank in (first, second):
            torch.testing.assert_close(rank["after"][name], mean, rtol=0, atol=TOLERANCE)
    assert first["after"]["1.num_batches_tracked"] == 4
    assert torch.equal(first["after"]["table"], torch.arange(5.0) / 3)


def test_a_rank_skips_its_own_step_and_the_others_go_on(tmp_path: Path) -> None:
    found = everyrank.launch(apart.train_poisoned_apart, tmp_path, ["skip", "stop"], nproc_per_node=2)
    assert sorted(rank["skip"]["num_updates"] for rank in found) == [10, 11]
    assert (tmp_path / "skip" / "logs" / "rank-0.log").read_text().count("step skipped") == 1
    for rank in found:
        assert rank["skip"]["lr"] == pytest.approx(0.05 * 0.1), "the learning rate goes on with the skipped step too"
        assert all(torch.isfinite(value).all() for value in rank["skip"]["weights"].values())
        assert torch.equal(rank["skip"]["weights"]["0.weight"], found[0]["skip"]["weights"]["0.weight"])
        assert "samples [" in rank["stop"]["error"]
        assert rank["stop"]["rank"] == found[0]["stop"]["rank"]


# A checkpoint every 6 steps, of which most fall between two syncs, and dropout: each rank's own randomness.
RESUMED = with_local(
    {
        "checkpoint_every_steps": 6,
        "ledger": True,
        "keep_best": 0,
        "dropout": 0.5,
        "ema": {"decay": 0.9},
        "scheduler": {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 9}, "interval": "step"},
        **ADAM,
    },
    {"every": 4, "outer_optimizer": {}},
)


def launch(folder: Path, size: int, rank: int = 0, after: int = 0, harm: str = "none", **changes: Any) -> Any:
    settings = {**RESUMED, **changes}
    return everyrank.launch(tiny.train_with_harm, folder, settings, rank, after, harm, nproc_per_node=size)


def used_exactly_once(run: Path) -> bool:
    counts = Counter((entry["epoch"], sample) for entry in read_ledger(run / "ledger") for sample in entry["samples"])
    return counts == Counter({(epoch, sample): 1 for epoch in range(3) for sample in range(103)})


@pytest.mark.parametrize("size", [nightly(2), 3])
def test_killed_and_resumed_bitwise(tmp_path: Path, size: int) -> None:
    whole = launch(tmp_path / "whole", size)
    with pytest.raises(RankFailedError):
        launch(tmp_path, size, rank=1, after=160 // size, harm="SIGKILL")
    (tmp_path / "harmed").unlink()
    stopped = launch(tmp_path, size, rank=1, after=60 // size, harm="SIGTERM")
    assert all("SIGTERM" in rank["preempted"] for rank in stopped)
    resumed = launch(tmp_path, size)
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert len(re.findall(r"Resuming from .* step [1-9]", log)) == 2
    for one, other in zip(whole, resumed, strict=True):
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name])
        assert one["steps"] == other["steps"]
        assert [row["loss"] for row in one["validation"]] == [row["loss"] for row in other["validation"]]
    assert used_exactly_once(tmp_path / "run")


def test_resumed_at_other_world_sizes_from_the_mean_of_the_optimizers(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError):
        launch(tmp_path, 3, rank=0, after=50, harm="SIGKILL")
    (tmp_path / "harmed").unlink()
    saved = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1].path)
    own = [saved.own_tensors(rank) for rank in range(3)]
    assert not own[0], "rank 0's lies where every run's does"
    for size in (1, 2):
        for found in everyrank.launch(apart.optimizer_after_resume, tmp_path, RESUMED, nproc_per_node=size):
            assert found["step"] == saved.step
            for number, state in found["state"].items():
                name = f"state.{number}.exp_avg"
                states = [saved.tensors["optimizer"][name], *(rank[f"optimizer.{name}"] for rank in own[1:])]
                assert not torch.equal(states[0], states[1]), "each rank had its own"
                torch.testing.assert_close(state["exp_avg"], torch.stack(states).mean(0), rtol=0, atol=TOLERANCE)
                assert state["step"] == saved.step
    with pytest.raises(RankFailedError):
        launch(tmp_path, 2, rank=1, after=40, harm="SIGKILL")
    (tmp_path / "harmed").unlink()
    assert launch(tmp_path, 1)[0]["step"] == 33
    assert used_exactly_once(tmp_path / "run")


def test_a_run_without_local_updates_goes_on_from_one_with_them_and_back(tmp_path: Path) -> None:
    launch(tmp_path, 2, num_epochs=1)
    launch(tmp_path, 2, num_epochs=2, parallel={})
    assert launch(tmp_path, 2, num_epochs=3)[0]["step"] == 33
    assert used_exactly_once(tmp_path / "run")


def test_folders_that_are_not_shared_keep_rank_zeros_state_and_say_so(tmp_path: Path) -> None:
    changes = with_local({"num_epochs": 1, **ADAM}, {"every": 4})
    everyrank.launch(apart.train_on_folders_of_their_own, tmp_path, changes, nproc_per_node=2)
    assert "is not shared by all ranks" in (tmp_path / "node0" / "logs" / "rank-0.log").read_text()
    found = everyrank.launch(
        apart.train_on_folders_of_their_own, tmp_path, {**changes, "num_epochs": 2}, nproc_per_node=2
    )
    assert found[0]["step"] == found[1]["step"] == 22
    assert torch.equal(found[0]["weights"]["0.weight"], found[1]["weights"]["0.weight"])


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"strategy": "fsdp2"}, "parallel.local_updates: every rank needs a whole model"),
        ({"comm_hook": "bf16"}, "parallel.comm_hook: found 'bf16', but with parallel.local_updates no gradients"),
        ({"sync_batchnorm": True}, "parallel.sync_batchnorm: found true, but it sends statistics in each step"),
        ({"static_graph": True}, "they are DDP's, which parallel.local_updates does without"),
        ({"local_updates": {"evry": 4}}, "parallel.local_updates.evry: unknown key. Did you mean 'every'"),
        ({"local_updates": {"every": 0}}, "parallel.local_updates.every: found 0"),
        ({"local_updates": {"compress": "fp16"}}, "parallel.local_updates.compress: found 'fp16'"),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path: Path, parallel: dict[str, Any], message: str) -> None:
    config = tiny.make_config(tmp_path, parallel={"local_updates": {}, **parallel})
    with pytest.raises(ConfigError) as error:
        read_config(config)
    assert message in str(error.value)


def test_an_outer_optimizer_that_refuses_is_named(tmp_path: Path) -> None:
    outer = {"kwargs": {"lr": 0.7, "nesterov": True}}
    config = tiny.make_config(tmp_path / "run", parallel={"local_updates": {"outer_optimizer": outer}})
    with pytest.raises(ConfigError, match=r"outer_optimizer SGD refused its arguments: Nesterov momentum requires"):
        everyrank.TrainerDDP(config=config)
    assert not (tmp_path / "run").exists(), "nothing is left behind"
