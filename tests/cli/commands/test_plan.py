"""``everyrank plan`` against real runs at sizes 1 to 3, and its arithmetic up to 4,096 ranks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import RunCli, nightly
from everyrank.cli.commands.plan_numbers import compute
from everyrank.cli.main import main
from everyrank.data.split import split_sizes
from everyrank.training.config import read_config

PLAN = (sys.executable, "-m", "everyrank", "plan")
SMALL = (
    *("app=causal_sets", "app.data.kwargs.num_samples=90", "app.data.kwargs.max_size=16", "app.training.num_epochs=2"),
    *("app.training.global_batch_size=10", "++app.training.checkpoint_at=1", "++app.training.ledger=true"),
)


def trainer_config(parallel: dict[str, object] | None = None, **training: object) -> object:
    return read_config(
        {
            "parallel": parallel or {},
            "criterion": "torch.nn.functional.mse_loss",
            "model": {"type": "torch.nn.Linear", "args": [4, 1]},
            "training": {"path": "unused", "num_epochs": 3, "optimizer_kwargs": {"lr": 0.1}, **training},
        }
    )


@pytest.mark.parametrize("world_size", [nightly(1), nightly(2), 3])
def test_a_plan_says_what_the_run_then_does(
    run_cli: RunCli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world_size: int,
) -> None:
    driver = ("driver=torchrun", f"driver.nproc_per_node={world_size}")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *driver, *SMALL]) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "outputs").exists(), "a plan writes nothing"
    done = run_cli(*driver, *SMALL)
    assert done.returncode == 0, done.stderr
    run = next(tmp_path.glob("outputs/causal_sets-*"))

    per_epoch, steps = _numbers(planned, r"optimizer steps: (\S+) an epoch, (\S+) in all")
    checkpoints = sorted(run.glob("checkpoints/step-*"))
    assert [int(path.name.removeprefix("step-")) for path in checkpoints] == [per_epoch, steps]
    assert "checkpoints: 2 of" in planned
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "train_loss" in row]
    last = re.search(r"learning rate: from 0.003 over at most 0.003 to (\S+)", planned)
    assert last is not None
    assert float(last.group(1)) == pytest.approx(rates[-1], rel=1e-3)

    size, unit = re.search(r"checkpoints: 2 of (\S+) (\w+) each", planned).groups()  # type: ignore[union-attr]
    tensors = sum(path.stat().st_size for path in checkpoints[0].glob("*.safetensors"))
    assert float(size) * {"KiB": 1024, "MiB": 1024**2}[unit] == pytest.approx(tensors, rel=0.25)

    train = _numbers(planned, r"samples: (\S+) training")[0]
    low, high = (_numbers(planned, r"samples on a rank and epoch: (\S+)(?: to (\S+))?") * 2)[:2]
    assert low * world_size <= train <= high * world_size


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in:\n{text}"
    return [int(group.replace(",", "")) for group in found.groups() if group is not None]


def test_a_plan_of_4096_ranks_names_the_commands(run_cli: RunCli) -> None:
    done = run_cli(
        *("app=causal_sets", "driver.nnodes=512", "driver.nproc_per_node=8", "app.training.global_batch_size=8192"),
        "num_samples=1000000",
        program=PLAN,
    )
    assert done.returncode == 0, done.stderr
    assert "world size: 4096 (512 nodes, 8 ranks each)" in done.stdout
    assert "global batch: 8,192 samples, 2 on a rank; the last of an epoch: 3,680" in done.stdout
    assert "optimizer steps: 86 an epoch" in done.stdout
    assert "--nnodes=512 --nproc-per-node=8" in done.stdout
    assert "nodes 1 to 511: the same command with driver.node_rank=1 to 511" in done.stdout


@settings(max_examples=30, deadline=None)
@given(
    num_samples=st.integers(10, 20_000),
    batch=st.integers(1, 5000),
    world_size=st.sampled_from([1, 2, 3, 7, 64, 1000, 4096]),
    drop_last=st.booleans(),
    accumulation=st.integers(1, 4),
)
def test_shares_and_steps_add_up(
    num_samples: int, batch: int, world_size: int, drop_last: bool, accumulation: int
) -> None:
    assume(not drop_last or batch <= split_sizes(num_samples, [0.8, 0.1, 0.1])[0])  # refused: nothing would be left
    config = trainer_config(global_batch_size=batch, drop_last=drop_last, accumulation_steps=accumulation)
    numbers = compute(config, num_samples, world_size)  # type: ignore[arg-type]
    assert numbers.num_train + numbers.num_validation + numbers.num_test == num_samples
    used = numbers.num_train // batch * batch if drop_last else numbers.num_train
    batches = -(-used // batch)
    assert numbers.steps_per_epoch == -(-batches // accumulation)
    assert numbers.num_steps == 3 * numbers.steps_per_epoch
    low, high = numbers.epoch_per_rank
    assert low * world_size <= used <= high * world_size
    assert high - low <= batches, "a rank has at most one sample more than another in each batch"
    assert numbers.sent_per_step == 2 * (world_size - 1) * 5 * 4 // world_size  # a Linear(4, 1) in float32


def test_local_updates_travel_now_and_then_and_every_optimizer_is_saved() -> None:
    local = {"every": 16, "compress": "bf16", "outer_optimizer": {}}
    plain, apart = (
        compute(trainer_config(parallel, global_batch_size=8), 100, 4)  # type: ignore[arg-type]
        for parallel in ({}, {"local_updates": local})
    )
    assert (plain.sent_every, apart.sent_every) == (1, 16)
    assert apart.sent_per_step == plain.sent_per_step // 2
    weights = 5 * 4
    momentum = weights
    assert apart.checkpoint_bytes == weights + momentum + 4 * (plain.checkpoint_bytes - weights)
