"""Programs for CUDA and NCCL, rehearsed at two ranks, beside the same programs run plainly on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
REHEARSED = (sys.executable, "-m", "everyrank.rehearsal", "-n", "2", "--")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def _run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(cwd), **variables},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_process_gets_consistent_answers(tmp_path: Path) -> None:
    output = _run(*REHEARSED, sys.executable, PROGRAMS / "answers.py", cwd=tmp_path)
    assert output.count("as with CUDA") == 7


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_trainer_takes_the_steps_it_takes_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    rehearsed = _losses(_run(*REHEARSED, *TORCHRUN, PROGRAMS / "gpt.py", dtype, cwd=tmp_path), "cuda:{rank}")
    plain = _losses(_run(*TORCHRUN, PROGRAMS / "gpt.py", dtype, cwd=tmp_path), "cpu")
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


def test_a_sitecustomize_of_the_users_runs_as_well(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('mine was run')")
    code = "import sys; print('torch' in sys.modules); import torch; print(torch.cuda.device_count())"
    output = _run(*REHEARSED, sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert output.split("\n")[:3] == ["mine was run", "False", "2"]


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
