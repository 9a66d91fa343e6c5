"""Kills at every call of a save, full disks, vanished folders: earlier checkpoints stay whole, errors are heard."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm_start

from everyrank import current_world
from everyrank.checkpoint.checkpointer import Checkpointer
from everyrank.checkpoint.folder import list_checkpoints
from everyrank.errors import CheckpointError

PROGRAMS = Path(__file__).parent / "programs"


def run_program(name: str, *args: object) -> str:
    command = [sys.executable, str(PROGRAMS / name), *map(str, args)]
    done = warm_start.run(command, timeout_s=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("scenario", ["new", "foreground", "replace", "retention"])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, scenario: str) -> None:
    report = json.loads(run_program("killed_writer.py", tmp_path / "checkpoints", scenario))
    assert report["num_kills"] >= 40
    assert report["found"] == ([1] if scenario == "replace" else [1, 2])


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what was not flushed, which no kill shows: in the order of the system calls."""
    flushed: set[int] = set()  # inodes
    left_out: dict[str, list[str]] = {}
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def noted_rename(old: Path, new: Path) -> None:
        left_out[new.name] = [path.name for path in (old, *old.iterdir()) if path.stat().st_ino not in flushed]
        flushed.discard(new.parent.stat().st_ino)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    with Checkpointer(tmp_path, world=current_world()) as checkpointer:
        checkpointer.save(1, tensors={"model": {"w": torch.ones(3)}}, state={}, rank_state={})
    assert left_out == {"step-00000001": []}
    assert tmp_path.stat().st_ino in flushed, "the new name itself"


_BACKGROUND = (True, False)
_LIMITS = (0, 100, 4096, 399_999)


@pytest.fixture(scope="module")
def full_disks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, bool], tuple[Path, list[str]]]:
    """For each limit and way of writing: the folder, and what was said of a full disk and afterwards."""
    cases = {case: tmp_path_factory.mktemp("full") for case in itertools.product(_LIMITS, _BACKGROUND)}
    words = [word for (limit, background), folder in cases.items() for word in (folder, limit, background)]
    said = json.loads(run_program("full_disk.py", *words))
    return {case: (folder, errors) for (case, folder), errors in zip(cases.items(), said, strict=True)}


@pytest.mark.parametrize("background", _BACKGROUND)
@pytest.mark.parametrize("limit", _LIMITS)
def test_a_full_disk_is_reported_and_forgotten_when_there_is_room_again(
    full_disks: dict[tuple[int, bool], tuple[Path, list[str]]], limit: int, background: bool
) -> None:
    folder, (full, afterwards) = full_disks[limit, background]
    assert "could not be written" in full
    assert "File too large" in full
    assert str(folder) in full
    assert afterwards == ""
    assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000003"]
    assert all(info.verified for info in list_checkpoints(folder))


def test_a_full_file_system_is_reported_too(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        [(full, again)] = json.loads(run_program("full_disk.py", folder, "none", True))
        assert full == ""  # two checkpoints of 400 kB fit
        assert "No space left on device" in again
        assert [(info.step, info.verified) for info in list_checkpoints(folder)] == [(1, True), (2, True)]
        assert sorted(os.listdir(folder)) == ["step-00000001", "step-00000002"]
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("background", [True, False])
def test_a_vanished_folder_is_reported_and_not_made_again_elsewhere(tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "checkpoints"
    checkpointer = Checkpointer(folder, world=current_world(), background=background)
    shutil.rmtree(folder)

    def save() -> None:
        checkpointer.save(1, tensors={}, state={}, rank_state={})
        checkpointer.wait()

    with pytest.raises(CheckpointError, match="could not be written"):
        save()
    assert not folder.exists()
    folder.mkdir()
    save()
    assert checkpointer.latest() is not None


@pytest.mark.parametrize("ask", ["check", "wait", "close", "save", "exit"])
def test_the_writers_error_comes_up_once_wherever_it_is_asked_for(tmp_path: Path, ask: str) -> None:
    folder = tmp_path / "checkpoints"
    checkpointer = Checkpointer(folder, world=current_world())
    shutil.rmtree(folder)
    checkpointer.save(1, tensors={}, state={}, rank_state={})

    def check_until_it_is_heard() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            checkpointer.check()
            time.sleep(0.01)

    calls = {
        "check": check_until_it_is_heard,
        "save": lambda: checkpointer.save(2, tensors={}, state={}, rank_state={}),
        "exit": lambda: checkpointer.__exit__(None, None, None),
    }
    with pytest.raises(CheckpointError, match="Earlier checkpoints are whole"):
        calls.get(ask, getattr(checkpointer, ask, None))()
    checkpointer.check()


def test_an_exception_of_the_training_is_not_hidden_by_the_writers(tmp_path: Path) -> None:
    def train() -> None:
        with Checkpointer(tmp_path / "x", world=current_world()) as checkpointer:
            shutil.rmtree(tmp_path / "x")
            checkpointer.save(1, tensors={}, state={}, rank_state={})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_nothing_is_lost_at_exit_without_close(tmp_path: Path) -> None:
    program = (
        "import sys, torch, everyrank\n"
        "c = everyrank.Checkpointer(sys.argv[1], world=everyrank.current_world())\n"
        "c.save(5, tensors={'model': {'w': torch.ones(3_000_000)}}, state={}, rank_state={})\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=60)
    assert [(info.step, info.verified) for info in list_checkpoints(tmp_path)] == [(5, True)]


def test_a_living_writer_is_not_disturbed(tmp_path: Path) -> None:
    """Another program that opens the run's checkpoints, to look at them, must not sweep away the one being written."""
    from everyrank.checkpoint.folder import remove_leftovers, writing

    with writing(tmp_path, 3, "token") as temporary:
        remove_leftovers(tmp_path)
        assert temporary.is_dir()
        (temporary / "file").touch()
    assert os.listdir(tmp_path) == ["step-00000003"]


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(30))
def test_a_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    program = (
        "import sys, itertools, torch, everyrank\n"
        "c = everyrank.Checkpointer(sys.argv[1], world=everyrank.current_world(), keep_last=2)\n"
        "for step in itertools.count(1):\n"
        "    w = torch.full((500_000,), float(step))\n"
        "    c.save(step, tensors={'model': {'w': w}}, state={}, rank_state={})\n"
        "    step == 3 and print('three', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=rng.uniform(0, 0.2))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    checkpointer = Checkpointer(tmp_path, world=current_world())
    info = checkpointer.latest()
    assert info is not None
    assert info.step >= 2
    assert torch.equal(checkpointer.load(info).tensors["model"]["w"], torch.full((500_000,), float(info.step)))
    assert not [name for name in os.listdir(tmp_path) if not name.startswith("step-")]
