"""The doctor as a person calls it: on a machine that is well, with things wrong, and on every rank of a run."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from conftest import RunCli
from everyrank.doctor.app import merge
from everyrank.doctor.check import Check
from everyrank.elastic.process.torch_bound import LOWEST

Ask = Callable[..., CompletedProcess[str]]
DOCTOR = (sys.executable, "-m", "everyrank", "doctor")


@pytest.fixture
def doctor(run_cli: RunCli) -> Ask:
    return lambda *args, **env: run_cli(*args, program=DOCTOR, env=env)


def test_a_machine_that_is_well(doctor: Ask) -> None:
    done = doctor("--json", "--peer", "127.0.0.1")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert all(set(check) == {"name", "status", "found", "fix"} for check in checks.values())
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    assert all(check["fix"] for check in checks.values() if check["status"] != "ok")
    assert "GiB/s" in checks["all_reduce by gloo"]["found"]
    assert "127.0.0.1" in checks["way to 127.0.0.1"]["found"]
    assert checks["locks and renames"]["status"] == "ok"
    assert f"(supported: >={'.'.join(map(str, LOWEST))},<" in checks["torch"]["found"]
    for name, program in (("Open MPI", "mpirun"), ("ssh", "ssh"), ("Slurm", "sbatch")):
        version = r"[^\n]*\d+\.\d+[^\n]* at /" if shutil.which(program) else "not installed"
        assert re.match(version, checks[name]["found"]), checks[name]


def test_what_is_wrong_is_said_with_its_cure(doctor: Ask) -> None:
    wrong = {"RANK": "0", "GLOO_SOCKET_IFNAME": "no-such0", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    done = doctor("--json", "--folder", "/proc/nowhere", "--peer", "no-such-host.invalid", **wrong)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 1
    for name, part in (
        ("launcher variables", "WORLD_SIZE is missing"),
        ("GLOO_SOCKET_IFNAME", "no interface no-such0"),
        ("locks and renames", "in /proc"),
        ("way to no-such-host.invalid", "does not resolve"),
    ):
        assert checks[name]["status"] == "wrong", checks[name]
        assert part in checks[name]["found"]
        assert checks[name]["fix"]
    assert checks["TORCH_DISTRIBUTED_DEBUG"]["status"] == "warn"


def test_on_every_rank_of_a_run(run_cli: RunCli) -> None:
    done = run_cli("driver=torchrun", "doctor", "driver.nproc_per_node=2", program=DOCTOR[:-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("locks and renames") == 1
    assert "s apart" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"), [(("torchrun",), "key=value"), (("driver=torchrun", "--json"), "--json")]
)
def test_what_was_mistyped(doctor: Ask, arguments: tuple[str, ...], named: str) -> None:
    done = doctor(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert "Fix: " in done.stderr


def test_where_ranks_differ_each_is_named() -> None:
    torch_26, torch_213 = Check("torch", "ok", "2.6.0"), Check("torch", "ok", "2.13.0")
    disk, full = Check("disk of the runs", "ok", "9 GiB"), Check("disk of the runs", "warn", "1 GiB", "make room")
    same = Check("Python", "ok", "3.11.7")
    reports = [("rank 0 on a", [torch_26, disk, same]), ("rank 1 on b", [torch_213, full, same])]
    torch, space, python = merge(reports)
    assert (torch.status, torch.found) == ("warn", "rank 0 on a: 2.6.0\nrank 1 on b: 2.13.0")
    assert "one version of torch" in torch.fix
    assert (space.status, space.fix) == ("warn", "make room")
    assert python == same
