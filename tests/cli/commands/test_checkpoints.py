"""``everyrank checkpoints`` and ``everyrank export`` on a run of the certificate's app, whole and damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from conftest import RunCli
from everyrank.certification.evidence import Evidence

EVERYRANK = (sys.executable, "-m", "everyrank")


@pytest.mark.slow
def test_a_run_is_listed_damaged_resumed_and_exported(run_cli: RunCli, tmp_path: Path) -> None:
    train = (
        "run",
        "driver=local",
        "app=certify",
        "app.data.kwargs.delay_s=0",
        "run.dir=run",
        "+app.training.keep_best=0",
    )
    done = run_cli(*train, program=EVERYRANK)
    assert done.returncode == 0, done.stderr
    weights = {name: value.clone() for name, value in Evidence.of(tmp_path / "run").weights.items()}  # they are mapped
    listed = run_cli("checkpoints", "run", program=EVERYRANK)
    assert listed.returncode == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in listed.stdout.splitlines() if "│" in line]
    assert [(row[0], row[3], row[5]) for row in rows] == [("32", "1", "yes"), ("33", "1", "yes")]
    assert rows[1][1], "the epoch's end has a metric"

    model = tmp_path / "run" / "checkpoints" / "step-00000033" / "model.safetensors"
    damaged = bytearray(model.read_bytes())
    damaged[-1] ^= 1
    model.write_bytes(damaged)
    listed = run_cli("checkpoints", "run", program=EVERYRANK)
    assert listed.returncode == 1
    told = " ".join(listed.stdout.replace("│", " ").split())
    assert "NO: " in told
    assert "model.safetensors" in told

    exported = run_cli("export", "run", "model.pth", program=EVERYRANK)
    assert exported.returncode == 0, exported.stderr
    assert "skipping the damaged checkpoint" in exported.stderr
    assert "step-00000033" in exported.stderr
    assert "step-00000032 instead" in exported.stderr
    earlier = torch.load(tmp_path / "model.pth", weights_only=True)
    shapes = {name: value.shape for name, value in weights.items() if not name.startswith("average of ")}
    assert {name: value.shape for name, value in earlier.items()} == shapes
    assert not torch.equal(earlier["0.weight"], weights["0.weight"]), "these are of step 32"

    again = run_cli(*train, program=EVERYRANK)
    assert again.returncode == 0, again.stderr
    assert "skipping the damaged checkpoint step-00000033" in again.stdout + again.stderr
    evidence = Evidence.of(tmp_path / "run")
    assert all(set(uses.values()) == {1} and len(uses) == 103 for uses in evidence.uses.values())
    assert all(torch.equal(evidence.weights[name], value) for name, value in weights.items())


def test_a_folder_without_checkpoints(run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("checkpoints", ".", program=EVERYRANK)
    assert done.returncode == 2
    assert "there are no checkpoints" in done.stderr
