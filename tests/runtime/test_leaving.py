"""Gloo groups that are left while a model still uses them: torch 2.13 hangs, or aborts at the end, without our cure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from everyrank.elastic.guarded import guarded

_TRAIN = """
import faulthandler
import sys

import torch
import torch.distributed as dist


def train(number):
    {enter}
    layers = [torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    for _ in range(3):
        model(torch.randn(8, 64)).square().mean().backward()
    {leave}
    return model
"""
_TORCH = {
    "enter": 'dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-{number}", rank=0, world_size=1)',
    "leave": "dist.destroy_process_group()",
}
_EVERYRANK = {
    "enter": "import everyrank; everyrank.initialize_ddp(0, 1, backend='gloo')",
    "leave": "everyrank.cleanup_ddp()",
}
_ROUNDS = "\nfaulthandler.dump_traceback_later(250, exit=True)\nfor number in range(120):\n    train(number)\n"

# Each end in a process of its own, by the interpreter's whole way out, from one import of torch. Each has a watchdog of
# its own as well: faulthandler's thread is not there after a fork, and the end of the interpreter waits for it.
_ENDS = """
import os
import time

ends, num_processes = {}, int(sys.argv[2])
for number in range(num_processes):
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(15, exit=True)
        model = train(number)
        break
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(pid, 9)
        ended = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(ended[1])
    ends[code] = ends.get(code, 0) + 1
else:
    sys.exit(ends != {0: num_processes} and f"exit codes and how many processes ended so: {ends}")
"""


def run(program: str, tmp_path: Path, *arguments: str) -> None:
    """Run it as a rank of an outside program is run."""
    command = guarded((sys.executable, "-c", program, str(tmp_path / "meeting"), *arguments))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.parametrize(
    "who", [pytest.param(_TORCH, marks=pytest.mark.nightly), _EVERYRANK], ids=["torch", "everyrank"]
)
def test_many_rounds_of_join_train_leave(who: dict[str, str], tmp_path: Path) -> None:
    """Without the cure it hangs within these rounds, more often than not: the model outlives its group."""
    run(_TRAIN.format(**who) + _ROUNDS, tmp_path)


@pytest.mark.nightly  # without the cure few of them do not: it takes many to see it
@pytest.mark.parametrize("leave", ["dist.destroy_process_group()", "pass"])
def test_every_process_ends_well_with_its_model_alive(leave: str, tmp_path: Path) -> None:
    run(_TRAIN.format(enter=_TORCH["enter"], leave=leave) + _ENDS, tmp_path, "60")


def test_a_sitecustomize_of_the_user_is_run_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('my own')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = guarded((sys.executable, "-c", "import sys; print(sys.modules['sitecustomize'].__file__)"))
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["my own", str(tmp_path / "sitecustomize.py")]
