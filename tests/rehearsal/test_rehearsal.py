"""Programs for CUDA and NCCL, rehearsed at two ranks, beside the same programs run plainly on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm_start

import everyrank
from conftest import nightly

sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "programs"))

import tiny

PROGRAMS = Path(__file__).parent / "programs"
REHEARSED = (sys.executable, "-m", "everyrank.rehearsal", "-n", "2", "--")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
RUN = (sys.executable, "-m", "everyrank", "run", "-n2", "--")


def _run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = warm_start.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(cwd), **variables},
        timeout_s=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_process_gets_consistent_answers(tmp_path: Path) -> None:
    output = _run(*REHEARSED, sys.executable, PROGRAMS / "answers.py", cwd=tmp_path)
    assert output.count("as with CUDA") == 7


@pytest.mark.parametrize("dtype", [nightly("bfloat16"), "float16"])
def test_a_trainer_takes_the_steps_it_takes_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    rehearsed = _losses(_run(*REHEARSED, *TORCHRUN, PROGRAMS / "gpt.py", dtype, cwd=tmp_path), "cuda:{rank}")
    plain = _losses(_run(*RUN, PROGRAMS / "gpt.py", dtype, cwd=tmp_path), "cpu")
    assert rehearsed == plain
    assert rehearsed[0] != rehearsed[1]  # each rank has its own samples
    assert rehearsed[0][-1] < rehearsed[0][0]


def _losses(output: str, device: str) -> dict[int, list[float]]:
    found = {}
    for rank, place, losses in re.findall(r"rank (\d) on (\S+): 8 steps, losses ([\d. ]+)", output):
        assert place == device.format(rank=rank)
        found[int(rank)] = [float(loss) for loss in losses.split()]
    assert sorted(found) == [0, 1], output
    return found


@pytest.mark.slow
def test_shards_and_checkpoints_are_those_of_the_cpu(tmp_path: Path) -> None:
    """FSDP2 (meta device, mixed precision, DCP) and tensor parallelism; the first FSDP trains as well."""
    order = (*RUN[:-1], "rehearse=cpu", "--", PROGRAMS / "sharded.py", tmp_path / "rehearsed")
    rehearsed = _parts(_run(*order, cwd=tmp_path))
    plain = _parts(_run(*RUN, PROGRAMS / "sharded.py", tmp_path / "plain", cwd=tmp_path))
    assert {(rank, name) for rank, name, _ in rehearsed} == {
        (rank, name) for rank in "01" for name in ("fsdp2", "fsdp1", "tensor parallel")
    }
    for rank, name, device in plain:
        assert device == "cpu"
        assert rehearsed[rank, name, "cuda"] == plain[rank, name, device]
    for losses in rehearsed.values():
        assert len(losses) == 6
        assert losses[-1] < losses[0]


def _parts(output: str) -> dict[tuple[str, str, str], list[float]]:
    found = re.findall(r"rank (\d) ([\w ]+) on (\w+): ([\d. ]+)", output)
    return {(rank, name, device): [float(loss) for loss in losses.split()] for rank, name, device, losses in found}


@pytest.mark.nightly  # by day under torchrun, below
def test_spawned_ranks_collect_and_share_their_moments(tmp_path: Path) -> None:
    output = _run(*REHEARSED, sys.executable, PROGRAMS / "spawned.py", tmp_path / "init", cwd=tmp_path)
    assert "2 GPUs" in output
    for rank in (0, 1):
        assert f"rank {rank} of 2: 4 steps, the weights of one process" in output


@pytest.mark.nightly
@pytest.mark.parametrize("library", ["accelerate", "fabric"])
def test_libraries_choose_cuda_by_themselves(tmp_path: Path, library: str) -> None:
    pytest.importorskip("lightning.fabric" if library == "fabric" else library)
    rehearsed = _run(*REHEARSED, *TORCHRUN, PROGRAMS / "libraries.py", library, cwd=tmp_path)
    plain = _run(*TORCHRUN, PROGRAMS / "libraries.py", library, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    loss = re.search(r"rank 0 of 2 on cpu(?::0)?: 12 steps, loss ([\d.]+)", plain)
    assert loss is not None, plain
    for rank in (0, 1):
        assert f"rank {rank} of 2 on cuda:{rank}: 12 steps, loss {loss[1]}" in rehearsed


def test_ranks_join_and_train_as_on_gpus(tmp_path: Path) -> None:
    program = PROGRAMS / "joined.py"
    output = _run(*REHEARSED, *TORCHRUN, program, tmp_path / "run", cwd=tmp_path)
    found = sorted((json.loads(text) for text in re.findall(r"FOUND (.*)", output)), key=lambda one: one["rank"])
    for rank, one in enumerate(found):
        assert one["backend"] == "cpu:gloo,cuda:nccl"
        assert one["device"] == f"cuda:{rank}"
        assert one["interfaces"] == ["lo", "lo"]
        assert one["agreed"] is True
        assert set(one["wrong"]) == {"nowhere", "=l"}
        for value, message in one["wrong"].items():
            assert f"NCCL_SOCKET_IFNAME={value} was set on " in message
            assert f"there is no interface {value.lstrip('=')} there, but " in message
            assert "Fix: unset it (then lo is used, as all ranks are on this machine)" in message
    assert len(found) == 2
    trainer = everyrank.TrainerDDP(config=tiny.make_config(tmp_path / "alone", optimizer_kwargs={"lr": 0.05}))
    trainer.prepare_dataloaders(train_dataset=tiny.make_data(), val_dataset=tiny.make_data(23, seed=1))
    trainer.run_training()
    assert found[0]["weight"] == found[1]["weight"] == pytest.approx(trainer.module[0].weight.sum().item(), abs=1e-12)


def test_a_sitecustomize_of_the_users_runs_as_well(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('mine was run')")
    code = "import sys; print('torch' in sys.modules); import torch; print(torch.cuda.device_count())"
    output = _run(*REHEARSED, sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    # Once in the Python that starts the command, and once in the command's.
    assert output.splitlines() == ["mine was run", "mine was run", "False", "2"]


def test_bad_orders_are_one_message(tmp_path: Path) -> None:
    for order, message in (
        (("-n", "0", "--", "true"), "--devices=0 was set. Fix:"),
        (("--", "no-such-program"), "error: no-such-program cannot be run"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "everyrank.rehearsal", *order], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
