"""The command line: what is wrong is one message with the nearest name, exit code 2, and nothing starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from conftest import ROOT, RunCli, cli_environment
from everyrank.cli.compose import for_each_composed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["driver=torchrn", "app=hello_dist"], ["driver=torchrn was set", "Did you mean 'torchrun'"]),
        (["app=helo_dist"], ["app=helo_dist was set", "Did you mean 'hello_dist'"]),
        (["app=hello_dist", "env=lokal"], ["Did you mean 'local'"]),
        (["app=hello_dist", "driver=torchrun", "driver.nproc=2"], ["driver.nproc", "Did you mean 'nproc_per_node'"]),
        (["app=hello_dist", "app.mesage=x"], ["app.mesage", "Did you mean 'message'"]),
        (["app=hello_dist", "+distributed.backed=x"], ["distributed.backed: unknown key", "Did you mean 'backend'"]),
        (["app=hello_dist", "distributed.backend=glo"], ["distributed.backend: found 'glo'", "Did you mean 'gloo'"]),
        (["app=hello_dist", "driver=torchrun", "driver.nproc_per_node=0"], ["driver.nproc_per_node=0 was set"]),
        (["app=hello_dist", "driver=torchrun", "driver.nnodes=two"], ["driver.nnodes", "'two'"]),
        (["driver=local"], ["no app was chosen", "hello_dist"]),
        (["app=hello_dist", "run.name=7"], ["run.name: found 7 (int)", """Fix: put it in quotes: "'7'"."""]),
        (["app=hello_dist", "doctor"], ["doctor was given", "key=value", "Fix: put a command first"]),
        (["app=custom"], ["app._target_: no value was set"]),
        (["app=custom", "app._target_=nowhere.App"], ["no module nowhere"]),
        (["app=custom", "app._target_=probe_apps.Wait"], ["has no 'Wait'", "Did you mean 'Waits'"]),
        (["app=hello_dist", "app.message="], []),
    ],
    ids=lambda value: " ".join(value)[:50] if value and "=" in value[0] else "",
)
def test_mistakes(run_cli: RunCli, tmp_path: Path, arguments: list[str], told: list[str]) -> None:
    done = run_cli(*arguments)
    if not told:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2, done.stderr
    assert [part for part in told if part not in done.stderr] == [], done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_an_app_whose_import_fails_says_where(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import a_package_nobody_has\nclass App:\n    def run(self, cfg): ...\n")
    done = run_cli("driver=torchrun", "app=custom", "app._target_=broken.App")
    assert done.returncode == 2
    assert done.stderr.count("importing broken failed: ModuleNotFoundError") == 1, done.stderr
    assert "broken.py:1" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_settings_alone_are_composed_as_by_hydras_main() -> None:
    of_hydra = "'${hydra:runtime.output_dir} ${hydra:job.name} ${hydra:runtime.choices.app} ${hydra:overrides.task}'"
    settings = ["app=hello_dist", f"app.message={of_hydra}", "env.variables.COLOUR=blue"]
    seen: list[Any] = []
    for more in ([], ["hydra.verbose=false"]):  # a setting of Hydra's own is for its main
        for_each_composed([*settings, *more], lambda cfg: seen.append(OmegaConf.to_container(cfg, resolve=True)))
        assert not HydraConfig.initialized()
    assert seen[0] == seen[1]
    assert f"{Path.cwd()} compose hello_dist ['app=hello_dist'" in seen[0]["app"]["message"]


def test_dry_run_tells_all_and_does_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("driver=torchrun", "app=hello_dist", "driver.dry_run=true", "env.variables.COLOUR=blue")
    assert done.returncode == 0
    for part in ("command: torchrun --standalone", "variable: COLOUR=blue", "run.yaml", "message: Hello"):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_and_dry_run_import_no_torch(tmp_path: Path) -> None:
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["run", "app=hello_dist", "driver=torchrun", "driver.dry_run=true"],
    ):
        code = (
            "import sys; from everyrank.cli.main import main\n"
            f"try: code = main({arguments!r})\n"
            "except SystemExit as e: code = e.code\n"
            "assert not code, code\n"
            "assert 'torch' not in sys.modules, 'torch was imported'"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=cli_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "driver" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("rum", "Did you mean 'run'"),
        ("driver=torchrun rum", "Did you mean 'run'"),
        ("driver=local app=hello_dist", "Fix: everyrank run driver=local app=hello_dist"),
    ],
)
def test_everyrank_command_suggests_commands(words: str, told: str) -> None:
    command = [sys.executable, "-m", "everyrank", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr


def test_a_process_of_a_launcher_starts_no_other(run_cli: RunCli, tmp_path: Path) -> None:
    """``torchrun run.py app=...``: the ranks that are there run the app."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run_cli(
        str(ROOT / "run.py"), "driver=torchrun", "app=hello_dist", program=(*torchrun, f"--log-dir={tmp_path / 'tl'}")
    )
    assert done.returncode == 0, done.stderr
    assert "notice: driver=torchrun is not used: torchrun" in done.stderr
    assert done.stdout.count("[Rank 0] Sum of all ranks: 1\n") == 1
