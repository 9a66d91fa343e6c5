"""The certificate holds for the default app, and does not for an app that breaks the promise."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import RunCli
from everyrank.certification.evidence import Evidence
from everyrank.certification.launchers import Launcher, find_launchers
from everyrank.certification.trial import Trial, carry_out

CERTIFY = (sys.executable, "-m", "everyrank", "certify")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_at_another_size_and_its_evidence_shows_both(tmp_path: Path) -> None:
    torchrun = next(launcher for launcher in find_launchers()[0] if launcher.name == "driver=torchrun")
    overrides = ["app=certify", f"env.data_dir={tmp_path / 'data'}"]
    trial = Trial(torchrun, (2, 1), "SIGKILL rank", 1)
    run, num_delivered = carry_out(trial, tmp_path / "run", overrides, random.Random(3))
    assert num_delivered == 1
    assert "failed: killed by SIGKILL" in (run / "launch-0.log").read_text(), "a rank was hit, and not its launcher"
    evidence = Evidence.of(run)
    assert evidence.world_sizes == (2, 1)
    assert evidence.uses == {epoch: dict.fromkeys(evidence.uses[0], 1) for epoch in range(3)}
    assert len(evidence.uses[0]) == 103
    assert evidence.exactly_once(evidence)
    lost = evidence.uses[1].copy()
    del lost[next(iter(lost))]
    assert not replace(evidence, uses=evidence.uses | {1: lost}).exactly_once(evidence)


@pytest.mark.nightly
def test_kills_and_resizes_leave_every_sample_exactly_once(run_cli: RunCli) -> None:
    # Killed loader processes leave their folders of sockets, whose names must be short.
    with tempfile.TemporaryDirectory(prefix="c-", dir="/var/tmp") as folder:
        done = run_cli("--quick", "--seed=1", program=CERTIFY, timeout_s=560, env={"TMPDIR": folder})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(lines) == 8
    assert [line for line in lines if "NO" in line] == []
    assert any("2 → 1 → 3 → 2" in line and "3 x SIGKILL rank" in line for line in lines)
    assert sum("bitwise" in line for line in lines) == 5
    assert ["reference" in line for line in lines] == [True, True] + 6 * [False], "none is compared with itself"
    for what in ("moved", "fsdp2", "workers"):
        assert any(what in line and "1 x SIGKILL rank" in line and "bitwise" in line for line in lines), what


def test_an_app_that_looks_at_its_rank_gets_no_certificate(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "cheat.py").write_text(
        "import everyrank\n"
        "from everyrank.certification.data import mean_squared_error\n"
        "def loss(output, data):\n"
        "    return mean_squared_error(output, data) * (1 + everyrank.current_world().rank)\n"
    )
    done = run_cli("--launchers=driver=torchrun", "app.criterion=cheat.loss", program=CERTIFY)
    assert done.returncode == 1, done.stdout + done.stderr
    alone, on_two_ranks = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in alone] == ["python", "1", "-", "yes", "reference", "yes"]
    assert [cell.strip() for cell in on_two_ranks[:4]] == ["driver=torchrun", "2", "-", "yes"]
    assert on_two_ranks[5].strip() == "NO"


def test_wrong_settings(run_cli: RunCli) -> None:
    done = run_cli("app", program=CERTIFY)
    assert done.returncode == 2
    assert "write settings as key=value" in done.stderr


def test_a_launcher_that_is_not_there_is_named(run_cli: RunCli) -> None:
    done = run_cli("--launchers=sruun,python", program=CERTIFY, env={"PATH": ""})
    assert done.returncode == 2
    assert "--launchers=sruun was given, but it is no launcher that everyrank certifies. " in done.stderr
    done = run_cli("--launchers=srun", program=CERTIFY, env={"PATH": ""})
    assert done.returncode == 2
    assert "--launchers=srun was given, but srun: not installed. This machine has driver=torchrun," in done.stderr


_NO_RANK = """
import pathlib, subprocess, sys, time
ledger = pathlib.Path(sys.argv[1]) / "ledger"
ledger.mkdir(exist_ok=True)
helper = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
for step in range(9):
    (ledger / f"step-{step:08d}.jsonl").touch()
    time.sleep(0.1)
helper.stdin.close()
helper.wait()
"""


def test_a_kill_that_hit_no_rank_is_not_counted(tmp_path: Path) -> None:
    def command(_: int, args: Sequence[str]) -> list[str]:
        run = next(arg.partition("=")[2] for arg in args if arg.startswith("run.dir="))
        return [sys.executable, "-c", _NO_RANK, run]

    trial = Trial(Launcher("none", command), (1,), "SIGKILL rank", 1)
    _, num_delivered = carry_out(trial, tmp_path, [], random.Random(0))
    assert num_delivered == 0
    assert trial.faults(num_delivered) == "0 of 1 x SIGKILL rank"


# A step of the launch before is confirmed by the next one, which has taken none itself yet.
_CONFIRMS = """
import pathlib, sys, time
run = pathlib.Path(sys.argv[1])
(run / "logs").mkdir()
log = (run / "logs" / "rank-0.log").open("w")
(run / "ledger" / "step-00000004.pending").rename(run / "ledger" / "step-00000004.jsonl")
time.sleep(0.5)
(run / "has-trained").touch()
(run / "ledger" / "step-00000006.jsonl").touch()
time.sleep(600)
"""


def test_a_rank_is_killed_after_a_step_of_its_own(tmp_path: Path) -> None:
    def command(_: int, args: Sequence[str]) -> list[str]:
        script = "pass" if (tmp_path / "logs").exists() else _CONFIRMS
        return [sys.executable, "-c", script, str(tmp_path)]

    (tmp_path / "ledger").mkdir()
    for name in ("step-00000002.jsonl", "step-00000004.pending"):
        (tmp_path / "ledger" / name).touch()
    next_step = random.Random(2)
    assert random.Random(2).randint(1, 3) == 1
    _, num_delivered = carry_out(Trial(Launcher("none", command), (1,), "SIGKILL rank", 1), tmp_path, [], next_step)
    assert num_delivered == 1
    assert (tmp_path / "has-trained").exists()
