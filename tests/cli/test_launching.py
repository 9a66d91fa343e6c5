"""From a configuration to a launch: what is told of drivers and apps before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import RunCli
from everyrank.cli.launching import describe_app

PLAN = (sys.executable, "-m", "everyrank", "plan")


def test_hosts_that_count_their_own_ranks_leave_a_plan_without_numbers(run_cli: RunCli) -> None:
    args = ("app=causal_sets", "driver.hosts=[a,b]")
    done = run_cli(*args, "driver.nproc_per_node=auto", program=PLAN)
    assert done.returncode == 2
    assert "driver.nproc_per_node=auto was set with driver.hosts: each host counts its own" in done.stderr
    assert "Traceback" not in done.stderr
    counted = run_cli(*args, "driver.nproc_per_node=4", "num_samples=1000", program=PLAN)
    assert "world size: 8 (2 nodes, 4 ranks each)" in counted.stdout, counted.stderr


def test_a_driver_that_is_not_used_is_named_as_it_was_set(run_cli: RunCli) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    app = ("app=custom", "app._target_=probe_apps.UserMistake", "+app.width=-1")
    done = run_cli("driver=launch", *app, env=ranks)
    assert "notice: driver=launch is not used" in done.stderr


def test_a_command_is_seen_wherever_the_app_has_it_from(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text("from probe_apps import OutsideProgram as Program\nBases = (Program,)\n")
    (tmp_path / "inheriting.py").write_text(
        "import elsewhere\nfrom elsewhere import Program\n\n\nclass Child(Program):\n    pass\n\n\n"
        "class Computed(*elsewhere.Bases):\n    pass\n"
    )
    for target in ("elsewhere.Program", "inheriting.Program", "inheriting.Child", "inheriting.Computed"):
        done = run_cli("app=custom", f"app._target_={target}", "+app.code='print(6*7)'")
        assert (done.returncode, "42" in done.stdout) == (0, True), f"{target}: {done.stderr}"


def test_an_app_without_a_command_is_not_imported_to_see_that() -> None:
    assert not describe_app({"_target_": "everyrank.apps.causal_sets.app.CausalSetsApp"}).has_command
