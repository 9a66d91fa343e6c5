"""The folder of a run: one launch at a time, a name that leads nowhere else, one message where it cannot be used."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import WAITS, wait_for
from warm_start import Started

from conftest import ROOT, RunCli, cli_environment, nightly
from everyrank.cli.main import run
from everyrank.cli.run_folder import RunFolder
from everyrank.errors import ConfigError, UserError


def test_a_port_that_is_taken_leaves_no_folder(run_cli: RunCli, tmp_path: Path) -> None:
    """Nor does it remove one of an earlier run, or a folder above that was there before."""
    (tmp_path / "runs").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"driver.master_port={taken.getsockname()[1]}"
        done = run_cli("driver=torchrun", "app=hello_dist", "run.dir=runs/a/b", port)
        assert done.returncode == 2
        assert "is in use by another process" in done.stderr
        assert list((tmp_path / "runs").iterdir()) == []
        (tmp_path / "runs" / "c").mkdir()
        assert run_cli("driver=torchrun", "app=hello_dist", "run.dir=runs/c", port).returncode == 2
        assert (tmp_path / "runs" / "c").exists()


QUOTED = "driver='torchrun'"  # for which no engine is forked early: it would stay with this process


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["app.name=../.."], "app.name='../..' was set, but it names the run's folder"),
        (["run.name=a/b"], "run.name='a/b' was set, but it names the run's folder"),
        (["run.dir=a_file"], "a_file cannot be used: "),
        (["run.dir=a_file/below"], "a_file/below cannot be used: Not a directory. Fix: set run.dir"),
        (["env.output_dir=a_file"], "cannot be used: Not a directory"),
        (["run.log_level=LOUD"], "run.log_level: found 'LOUD' (str), but it must be one of 'DEBUG', 'INFO'"),
        (["distributed.timeout_s=inf"], "distributed.timeout_s: found inf (float), but it must be a finite number"),
        (["distributed.timeout_s=1e12"], "distributed.timeout_s: found 1000000000000.0 (float), but it must be less"),
        (["distributed.timeout_s=-1"], "distributed.timeout_s: found -1"),
        ([QUOTED, "driver.failure_grace_s=-1"], "driver.failure_grace_s: found -1"),
        ([QUOTED, "driver.shutdown_timeout_s=-0.5"], "driver.shutdown_timeout_s: found -0.5"),
        ([QUOTED, "driver.max_restarts=-1"], "driver.max_restarts: found -1"),
        (
            [QUOTED, "driver.nnodes=0"],
            "driver.nnodes: found 0 (int), but it must be greater",
        ),
        (["driver._target_=everyrank.drivers.local.LocalDrivr"], "Did you mean 'LocalDriver'?"),
        (["driver._target_=everyrank.drivers.lokal.LocalDriver"], "driver._target_ 'everyrank.drivers.lokal"),
        (["driver._target_=os.path.join"], "driver._target_=os.path.join was set, but that is no driver"),
        (["app=script", "app.command=3"], "app.command=3 was set; it is a program and its arguments"),
        (["app=script", "app.command={a: 1}"], "app.command={'a': 1} was set; it is a program and its arguments"),
        (["app=script", "app.command=[train.py,[1]]"], "app.command=['train.py', [1]] was set; it is a program"),
        (["app=script", "app.command='a.py \"b'"], 'app.command=a.py "b was set, which no shell can split'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_message_and_leave_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    driver = [] if QUOTED in arguments else ["driver=local"]
    assert run(["app=hello_dist", *driver, *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_four_starts_at_once_get_four_folders(
    tmp_path: Path, start_cli: Callable[..., Started], run_cli: RunCli
) -> None:
    arguments = ["driver=local", *WAITS]
    started = [start_cli(*arguments) for _ in range(4)]
    folders = tmp_path / "outputs"
    name = None
    for number in range(1, 5):
        if name is None:
            wait_for(folders)
        name = min((path.name for path in folders.iterdir()), key=len)
        wait_for(folders / (name if number == 1 else f"{name}-{number}") / "run.yaml")
    assert len(list(folders.iterdir())) == 4
    busy = run_cli(*arguments, f"run.dir={folders / name}")
    assert busy.returncode == 2
    assert re.search(r"is in use by pid \d+ on .*Fix: wait until", busy.stderr)
    for process in started:
        process.kill()
        process.wait()
    free = RunFolder("x", str(folders / name), False, is_asked_for=True)
    with free.held() as is_ours:
        assert is_ours, "their death has released it"
        other = subprocess.run([sys.executable, "-c", _HOLD, str(folders / name)], capture_output=True, text=True)
    assert "ConfigError" in other.stdout


_HOLD = """
import sys
from everyrank.cli.run_folder import RunFolder
try:
    with RunFolder("x", sys.argv[1], False, is_asked_for=True).held():
        print("held")
except Exception as error:
    print(type(error).__name__)
"""


def test_a_folder_that_must_be_new_is_made_by_one(tmp_path: Path) -> None:
    first = RunFolder("a", str(tmp_path / "a"), False, is_new=True)
    with first.held() as mine, RunFolder("a", str(tmp_path / "a"), False, is_new=True).held() as yours:
        assert (mine, yours) == (True, False)


def test_a_mistake_is_told_also_where_another_node_has_taken_the_folder_away(tmp_path: Path) -> None:
    path = tmp_path / "outputs" / "a"

    def launch() -> None:
        with RunFolder("a", str(path), shared=True).held():
            shutil.rmtree(path)  # the other node made the same mistake, and was quicker
            raise UserError("the mistake")

    with pytest.raises(UserError, match="the mistake"):
        launch()


def test_other_settings_in_the_same_folder_are_said(tmp_path: Path) -> None:
    folder = RunFolder("a", str(tmp_path), False, is_asked_for=True)
    now: dict[str, Any] = {"app": {"lr": 1, "data": {"size": 3}}, "env": {"variables": {}}, "rehearse": None}
    assert folder.differences(now) == []
    (tmp_path / "run.yaml").write_text(
        "{app: {lr: 1, data: {size: 3}}, env: {variables: {}, data_dir: d}, driver: {nproc_per_node: 2}}"
    )
    assert folder.differences(now) == []
    now = {"app": {"lr": 2, "data": {"size": 3, "seed": 0}}, "env": {"variables": {"LR": "3"}}, "rehearse": "cpu"}
    assert folder.differences(now) == [
        "app.lr: was 1, is 2",
        "app.data.seed: was None, is 0",
        "env.variables.LR: was None, is '3'",
        "rehearse: was None, is 'cpu'",
    ]
    with pytest.raises(ConfigError, match=r"app\.name"):
        RunFolder.choose({"run": {"name": None}, "env": {}, "app": {"name": "../.."}}, False)


def test_what_an_earlier_run_left_is_said_and_never_taken_for_this_runs(tmp_path: Path) -> None:
    app = ["driver=local", "app=custom", "app._target_=probe_apps.Returns"]
    program = ["driver=local", "run.dir=two", "--", sys.executable, "-c", "print('ran')"]
    launches = [
        [*app, "run.dir=one", "+app.value=1"],
        [*app, "run.dir=one", "+app.value=raise"],
        [*app, "run.dir=one", "+app.value=null"],
        [*app, "run.dir=one", "+app.value=2"],
        [*app, "run.dir=one", "+app.value=set"],
        [*app, "run.dir=one", "+app.value=set", "env.variables.LR=0.1", "resume=never"],
        [*app, "+app.value=1", "resume=nver"],
        ["resume=checkpoints/step-1", *program],
        ["-m", *app, "+app.value=3,4", "run.dir=three"],
        ["-m", *app, "+app.value=3,4", "run.name='value-${app.value}'"],
        ["-m", *app, "+app.value=5", "distributed.timeout_s=60,90", "run.name=five"],
        ["-m", "driver=local", "app.name=six", "distributed.timeout_s=60,90", *program[2:]],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCHES, json.dumps(launches)],
        cwd=tmp_path,
        env=cli_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes, results = json.loads(done.stdout.splitlines()[-1])
    said = done.stderr.split("---\n")
    assert codes == [0, 1, 0, 0, 0, 0, 2, 2, 2, 0, 0, 0]
    assert results == [1, None, None, 2, *[None] * 8], "an older result is not this run's"
    assert "one was used with other settings: app.value: was 1, is 'raise'" in said[1]
    assert "result is not kept" in said[4]
    assert "one was used with other settings: env.variables.LR: was None, is '0.1'" in said[5]
    assert "resume=never was set, but " in said[5]
    assert "resume=nver was set, but it is auto, never or the path of a checkpoint. Did you mean 'never'?" in said[6]
    assert "resume=checkpoints/step-1 was set, but a program is not told of it" in said[7]
    assert "share the folder" in said[8]
    assert "with other settings (app.value)" in said[8]
    assert said[9] == ""
    assert re.search(r"jobs of this multirun share .*five: each goes on where the one before ended", said[10])
    [six] = (tmp_path / "outputs").glob("six-*")
    assert f"jobs of this multirun share {six}: " in said[11]
    assert "Traceback" not in "".join(said[2:])
    assert not (tmp_path / "three").exists(), "nothing was started"
    assert not (tmp_path / "two").exists()
    folders = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert folders == {"multirun", "value-3", "value-4", "five", six.name}


_LAUNCHES = """
import json, os, sys
from everyrank.cli.main import run
codes, results = [], []
for arguments in json.loads(sys.argv[1]):
    codes.append(run(arguments))
    results.append(json.load(open("one/result.json")) if os.path.exists("one/result.json") else None)
    print("---", file=sys.stderr, flush=True)
print(json.dumps([codes, results]))
"""


@pytest.mark.parametrize("console", ["| true", *map(nightly, ("> /dev/full", ">&- 2>&- <&-"))])
def test_a_console_that_is_gone_does_not_end_the_run(tmp_path: Path, console: str) -> None:
    command = f"{sys.executable} {ROOT / 'run.py'} driver=local app=hello_dist run.dir=run {console}"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "processes completed successfully" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
