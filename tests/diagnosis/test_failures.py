"""A failing rank is named, and nothing survives it: real exceptions, real kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import WAITS, rank_pids, wait_gone
from warm_start import Started

from conftest import RunCli, nightly
from everyrank.diagnosis.judging.crashes import judge_crash
from everyrank.diagnosis.outcome import RankFailure
from everyrank.diagnosis.rank.record import record_error
from everyrank.diagnosis.rank_files import ask_for_reports, attempt_dir, report_file
from everyrank.diagnosis.verdict import UNDECIDED
from everyrank.errors import RankFailedError


@pytest.mark.parametrize("driver", ["torchrun", "spawn", nightly("launch")])
def test_an_exception_is_blamed_on_the_rank_that_raised_it(run_cli: RunCli, tmp_path: Path, driver: str) -> None:
    done = run_cli(f"driver={driver}", "app=custom", "app._target_=probe_apps.RaisesOnRank", "+app.guilty=1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-6:]
    told = "\n".join(last)
    assert "rank 1 of 2 failed: LookupError: the sample 1 is missing" in told, done.stderr
    assert "logs/rank-1.log" in told
    assert "probe_apps.py" in done.stderr, "the original traceback is shown"
    log = next(tmp_path.glob("outputs/*/logs/rank-1.log")).read_text()
    assert "LookupError: the sample 1 is missing" in log


@pytest.mark.parametrize("first", [0, 1])
def test_of_ranks_that_raise_the_first_with_an_error_of_its_own_is_named(tmp_path: Path, first: int) -> None:
    raised = [(2, RankFailedError("rank 0 failed", rank=0)), (first, ValueError("bad")), (1 - first, KeyError("late"))]
    failures = [RankFailure(rank=rank, exit_code=1, error=record_error(error, rank, 1)) for rank, error in raised]
    failures.sort(key=lambda failure: failure.rank)
    verdict = judge_crash(failures, str(tmp_path), world_size=3, attempt=0)
    assert verdict is not None
    assert (verdict.rank, verdict.said) == (first, "failed: ValueError: bad")


@pytest.mark.parametrize(("has_answered", "named"), [(True, 1), (False, None)])
def test_a_rank_of_another_host_is_blamed_for_its_answer_alone(
    tmp_path: Path, has_answered: bool, named: int | None
) -> None:
    """One that has said nothing since the others lost it may be busy, or gone with its host before it was seen."""
    folder = attempt_dir(str(tmp_path), 0)
    os.makedirs(folder)
    request = ask_for_reports(folder) if not has_answered else 0
    for rank, host, ended, answers in ((0, "here", "error", request), (1, "elsewhere", None, 0)):
        report = {
            **dict.fromkeys(("in_collective", "in_backward", "in_loader"), False),
            **dict.fromkeys(("stack", "collectives", "workers", "stopped"), ()),
            **dict.fromkeys(("started", "seq", "cpu_s", "data_share", "log_from", "time_s"), 0),
            **dict.fromkeys(("reads", "handling", "handled")),
            **{"rank": rank, "pid": 100 + rank, "host": host, "here": host, "groups": {}, "where": f"train.py:{rank}"},
            **{"ended": ended, "request": answers},
        }
        Path(report_file(folder, rank)).write_text(json.dumps(report))
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:51848: Connection reset by peer")
    failures = [RankFailure(rank=0, exit_code=1, error=record_error(lost, 0, 2))]
    verdict = judge_crash(failures, folder, world_size=2, attempt=0)
    assert verdict is not None
    assert verdict.rank == named
    assert (verdict.cause == UNDECIDED) == (named is None)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("before", "ValueError: the third sample"),
        ("killed", "killed by SIGKILL"),
        ("exits", "exit code 4"),
        ("beside", "exit code 4"),
        ("cleans up", "ValueError: the third sample"),
    ],
)
def test_an_exception_in_hand_is_blamed_only_if_it_ends_the_rank(run_cli: RunCli, case: str, said: str) -> None:
    program = Path(__file__).parent / "handling_program.py"
    done = run_cli("driver=torchrun", "app=script", "--", str(program), case)
    assert done.returncode == 1
    assert f"error: rank 1 of 2 failed: {said}" in done.stderr, done.stderr


def test_a_rank_says_where_it_is_in_a_folder_of_any_name(run_cli: RunCli, tmp_path: Path) -> None:
    folder = tmp_path / ("試験の" * 20) / ("二番目" * 20)
    folder.mkdir(parents=True)
    program = shutil.copy(Path(__file__).parent / "handling_program.py", folder)
    done = run_cli("driver=torchrun", "driver.nproc_per_node=1", "app=script", "--", str(program), "alone")
    assert done.returncode == 0, done.stderr


def test_a_killed_rank_is_named_and_the_other_is_ended(run_cli: RunCli) -> None:
    done = run_cli("driver=torchrun", "app=custom", "app._target_=probe_apps.KilledOnRank", "+app.guilty=1")
    assert done.returncode == 1
    assert "rank 1 of 2 failed: killed by SIGKILL" in done.stderr


@pytest.mark.parametrize("start_method", ["forkserver", nightly("spawn")])
def test_max_restarts_starts_the_group_again(run_cli: RunCli, start_method: str) -> None:
    done = run_cli(
        "driver=torchrun",
        "driver.max_restarts=2",
        f"driver.start_method={start_method}",
        "app=custom",
        "app._target_=probe_apps.KilledOnRank",
        "+app.guilty=0",
        "+app.attempts=1",
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank} went on in attempt 1" in done.stdout


def test_a_mistake_of_the_user_is_one_message_and_is_not_retried(run_cli: RunCli) -> None:
    done = run_cli("driver=torchrun", "driver.max_restarts=3", "app=custom", "app._target_=probe_apps.UserMistake")
    assert done.returncode == 2
    assert done.stderr.count("app.width=-1 was set") == 1
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("driver", "signum", "code"),
    [
        ("torchrun", signal.SIGTERM, 128 + signal.SIGTERM),
        ("torchrun", signal.SIGINT, 130),
        nightly("spawn", signal.SIGTERM, 128 + signal.SIGTERM),
        ("launch", signal.SIGINT, 130),
    ],
)
def test_a_signal_to_the_launcher_ends_every_rank(
    start_cli: Callable[..., Started], tmp_path: Path, driver: str, signum: int, code: int
) -> None:
    process = start_cli(f"driver={driver}", *WAITS)
    pids = rank_pids(tmp_path / "told")
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert wait_gone(pids) == []


def test_no_outside_program_outlives_a_launcher_killed_with_sigkill(
    start_cli: Callable[..., Started], tmp_path: Path
) -> None:
    """As no rank of ours does, under any driver: tests/drivers/test_orphans.py."""
    code = (
        "import os,time,pathlib; p=pathlib.Path('told'); p.mkdir(exist_ok=True);"
        "(p/('pid-'+os.environ['RANK'])).write_text(str(os.getpid()));"
        "time.sleep(0.5); (p/'joined').touch(); time.sleep(600)"
    )
    app = ("app=custom", "app._target_=probe_apps.OutsideProgram", f'+app.code="{code}"')
    process = start_cli("driver=torchrun", *app)
    pids = rank_pids(tmp_path / "told")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    assert wait_gone(pids) == []


def test_outside_program_runs_on_each_rank_and_its_failure_is_told(run_cli: RunCli, tmp_path: Path) -> None:
    target = ("driver=torchrun", "app=custom", "app._target_=probe_apps.OutsideProgram")
    done = run_cli(*target, "+app.code=\"import os; print('program', os.environ['RANK'], os.environ['WORLD_SIZE'])\"")
    assert done.returncode == 0, done.stderr
    assert "program 0 2" in done.stdout
    assert "program 1 2" in done.stdout
    assert "program 1 2" in next(tmp_path.glob("outputs/*/logs/rank-1.log")).read_text()
    done = run_cli(*target, "+app.code=\"import os,sys; sys.exit(3 * int(os.environ['RANK']))\"")
    assert done.returncode == 1
    assert "rank 1 of 2 failed: exit code 3" in done.stderr
