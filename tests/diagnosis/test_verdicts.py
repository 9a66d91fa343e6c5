"""Every kind of fault is named with its rank and cause, by the campaign that benchmarks run at length."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from troubleshooting_page import ENTRIES, VERDICT
from waiting import WAITS, rank_pids
from warm_start import Started

from conftest import ROOT, RunCli
from everyrank.diagnosis.rank_files import tell_to_end

# The fault that provokes each entry of the troubleshooting page; slow ranks and lost hosts have tests of their own.
_KIND_OF_ENTRY = {
    "exited": "exit",
    "out-of-memory": "out_of_memory",
    "left-early": "left_early",
    "stopped": "stopped",
    "skipped-collective": "skipped",
    "mismatched-collective": "wrong_shape",
    "silent-mismatch": "silent_type",
    "stuck-in-data-loading": "stuck_loader",
    "stuck-in-python": "asleep",
    "stuck-in-io": "blocked_read",
}
FAULTY = str(ROOT / "benchmarks" / "faulty_program.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_kind_of_fault_is_named(tmp_path: Path) -> None:
    out = tmp_path / "verdicts.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "verdicts.py"), "--num=25", "--bare=0", "--jobs=1"]
    command += ["--stall=4", "--end-after=5", "--drivers", "torchrun", "--told", "--out", str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    rows = {row["kind"]: row for row in json.loads(out.read_text())["faults"]}
    assert len(rows) == 25
    assert [row for row in rows.values() if row["judged"] != "right"] == []
    for cause, kind in _KIND_OF_ENTRY.items():
        entry = ENTRIES[VERDICT + cause]
        assert entry.missing(rows[kind]["told"]) == [], rows[kind]["told"]


def test_every_cause_of_the_troubleshooting_page_is_provoked() -> None:
    names = {name.removeprefix(VERDICT) for name in ENTRIES if name.startswith(VERDICT)}
    assert names == {*_KIND_OF_ENTRY, "lost-host", "slow"}


def test_a_slow_phase_is_told_once_and_ends_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    settings = ("driver=torchrun", "watch.stall_s=3", "watch.end_after_s=null", "--", FAULTY, "slow_step", "1", "5")
    done = run_cli("run", *settings, program=_EVERYRANK)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("notice: no rank has gone on for") == 1, done.stderr
    assert "rank 1 waits outside of any collective, while the others wait for it" in done.stderr
    assert done.stderr.count("notice: the ranks go on") == 1
    assert list(tmp_path.glob("outputs/*/verdict*.json")) == []


@pytest.mark.nightly  # by day a rank that raises under mpi: tests/drivers/test_mpi_kubernetes.py
@pytest.mark.parametrize(("driver", "is_watched"), [("launch", "false"), ("mpi", "true")])
def test_a_rank_that_leaves_no_word_is_named_by_its_launcher(
    run_cli: RunCli, tmp_path: Path, driver: str, is_watched: str
) -> None:
    settings = (f"driver={driver}", f"watch.enabled={is_watched}")
    done = run_cli("run", *settings, "--", FAULTY, "hard_exit", "1", "5", program=_EVERYRANK)
    assert bool(list(tmp_path.glob("outputs/*/watch"))) == (is_watched == "true")
    assert done.returncode == 1
    assert "error: rank 1 of 2 failed: exit code 4" in done.stderr, done.stderr
    verdict = json.loads(next(tmp_path.glob("outputs/*/verdict.json")).read_text())
    assert (verdict["rank"], verdict["cause"], verdict["exit_code"]) == (1, "exited", 4)


def test_a_rank_without_a_word_is_given_no_line_of_ours_and_no_words_of_an_earlier_run(
    run_cli: RunCli, tmp_path: Path
) -> None:
    """It ends before it has run a line of its program, of which only an earlier run has printed anything."""
    (tmp_path / "ends.py").write_text("import os\nif os.path.exists('again'):\n    os._exit(3)\nprint('from before')\n")
    settings = ("driver=torchrun", "app=script", "run.dir=run", "--", "ends.py")
    assert run_cli(*settings).returncode == 0
    (tmp_path / "again").touch()
    assert "from before" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    done = run_cli(*settings)
    assert done.returncode == 1
    assert "failed: exit code 3" in done.stderr
    assert "from before" not in done.stderr
    assert "at run.py" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a process a host name of its own, which only root may")
def test_a_stopped_rank_on_another_host_is_seen_and_ended_by_one_beside_it(run_cli: RunCli, tmp_path: Path) -> None:
    """As under Slurm with a task a rank: no process of the launcher's is there to look at it, or to end it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text('#!/bin/sh\nexec unshare --uts sh -c \'hostname elsewhere; exec mpirun "$@"\' sh "$@"\n')
    elsewhere.chmod(0o755)
    settings = ("driver=mpi", f"driver.mpirun={elsewhere}", "watch.stall_s=4", "--", FAULTY, "stopped", "1", "5")
    done = run_cli("run", *settings, program=_EVERYRANK)
    assert done.returncode == 1, done.stderr
    verdict = json.loads(next(tmp_path.glob("outputs/*/verdict.json")).read_text())
    assert (verdict["rank"], verdict["cause"], verdict["host"]) == (1, "stopped", "elsewhere"), done.stderr


def test_a_slow_rank_is_named_and_the_time_of_each_is_split(run_cli: RunCli, tmp_path: Path) -> None:
    """Nothing fails: rank 1 takes long to load each batch, rank 0 waits for it, and the run's files say so."""
    trainer = str(ROOT / "benchmarks" / "faulty_trainer.py")
    settings = ("run", "driver=torchrun", "run.dir=run", "--", trainer, "slow_loader", "1", "0", "run")
    done = run_cli(*settings, program=_EVERYRANK)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    seconds = next(row for row in rows if row["kind"] == "epoch")["rank_seconds"]
    assert seconds["data"][1] > 2 * seconds["data"][0]
    assert seconds["waiting"][0] > 2 * seconds["waiting"][1]
    assert run_cli("report", "run", program=_EVERYRANK).returncode == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert ENTRIES["verdict-slow"].missing(html.unescape(page)) == []
    assert "<th>waiting, s</th>" in page
    assert not (tmp_path / "run" / "verdict.json").exists()


def test_each_attempt_keeps_its_verdict(run_cli: RunCli, tmp_path: Path) -> None:
    """The guilty rank raises in every attempt; it is told at each restart, and written down."""
    settings = ("run", "driver=torchrun", "driver.max_restarts=1", "--", FAULTY, "raise", "1", "3")
    done = run_cli(*settings, program=_EVERYRANK)
    assert done.returncode == 1
    assert "notice: rank 1 failed: ValueError: something is wrong here" in done.stderr
    first, last = (next(tmp_path.glob(f"outputs/*/{name}.json")) for name in ("verdict-0", "verdict"))
    assert [json.loads(path.read_text())["attempt"] for path in (first, last)] == [0, 1]
    assert run_cli("report", str(last.parent), program=_EVERYRANK).returncode == 0
    page = (last.parent / "report.html").read_text()
    assert page.count("error: rank 1 failed: ValueError: something is wrong here") == 2
    assert "<h3>attempt 1</h3>" in page


def test_the_stacks_of_a_live_run_are_shown(run_cli: RunCli, start_cli: Callable[..., Started], tmp_path: Path) -> None:
    process = start_cli("driver=torchrun", *WAITS)
    os.kill(rank_pids(tmp_path / "told")[1], signal.SIGSTOP)
    done = run_cli("stacks", str(next(tmp_path.glob("outputs/*"))), program=_EVERYRANK)
    assert done.returncode == 0, done.stderr
    awake, stopped = done.stdout.split("rank 1:")
    assert awake.startswith("rank 0:")
    assert "probe_apps.py" in awake
    assert "is stopped" in stopped
    # As on a host where the watcher can send no signal: the rank that is told ends itself, and the launcher the other.
    tell_to_end(str(next(tmp_path.glob("outputs/*/watch/attempt-0"))), 0)
    assert process.wait(timeout=60) == 1
    verdict = json.loads(next(tmp_path.glob("outputs/*/verdict.json")).read_text())
    assert (verdict["rank"], verdict["cause"]) == (0, "killed")
    done = run_cli("stacks", str(tmp_path), program=_EVERYRANK)
    assert done.returncode == 2
    assert "no rank has reported there" in done.stderr


_EVERYRANK = (sys.executable, "-m", "everyrank")
