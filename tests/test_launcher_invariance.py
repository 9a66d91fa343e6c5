"""The first promise: the same program ends with the same weights under every launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import warm_start

from conftest import ROOT, RunCli, cli_environment, nightly

TRAINS = ("app=custom", "app._target_=probe_apps.Trains")


def result_of(run_cli: RunCli, tmp_path: Path, *driver: str) -> dict[str, Any]:
    name = "-".join(driver).replace("=", "_")
    done = run_cli(*driver, *TRAINS, f"run.name={name}")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((tmp_path / "outputs" / name / "result.json").read_text())
    return result


BARE = ("torch.distributed.run", "torch.distributed.launch", "torch.distributed.launch --use-env")


@pytest.mark.slow
@pytest.mark.parametrize("others", [(), nightly(BARE)], ids=["drivers", "bare as well"])
def test_equal_weights_under_every_launcher(run_cli: RunCli, tmp_path: Path, others: tuple[str, ...]) -> None:
    two = {
        name: result_of(run_cli, tmp_path, f"driver={name}", "driver.nproc_per_node=2")
        for name in ("spawn", "torchrun", "launch")
    }
    for flags in map(str.split, others):
        result_file = tmp_path / f"{'-'.join(flags)}.json"
        script = str(ROOT / "tests" / "support" / "probe_apps.py")
        command = [sys.executable, "-m", *flags, "--standalone", "--nproc-per-node=2", f"--log-dir={tmp_path / 'l'}"]
        warm_start.run([*command, script, str(result_file)], env=cli_environment(), timeout_s=120).check_returncode()
        two[" ".join(flags)] = json.loads(result_file.read_text())
    hashes = {name: result["hash"] for name, result in two.items()}
    assert len(set(hashes.values())) == 1, hashes
    one = result_of(run_cli, tmp_path, "driver=local")
    three = result_of(run_cli, tmp_path, "driver=torchrun", "driver.nproc_per_node=3")
    for other in (one, three):
        assert other["weights"] == pytest.approx(two["torchrun"]["weights"], abs=1e-10, rel=0)
