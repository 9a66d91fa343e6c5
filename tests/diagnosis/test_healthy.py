"""A run that is healthy is never ended, however unusual its program or slow its machine."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import RunCli

_EVERYRANK = (sys.executable, "-m", "everyrank")


def test_an_unusual_program_is_not_accused(run_cli: RunCli, tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("unusual_program.py"))
    done = run_cli("run", "driver=torchrun", "driver.nproc_per_node=3", "--", program, program=_EVERYRANK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("right") == 3
    assert list(tmp_path.glob("outputs/*/verdict*.json")) == []
