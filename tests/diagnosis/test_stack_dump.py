"""A process says where it is, and goes on."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

from everyrank.diagnosis.rank.stack_dump import register_stack_dump


def test_a_signal_prints_the_stacks(tmp_path: Path) -> None:
    with open(tmp_path / "stacks", "w") as file:
        assert register_stack_dump(file=file)
        try:
            os.kill(os.getpid(), signal.SIGQUIT)
        finally:
            faulthandler.unregister(signal.SIGQUIT)
    assert "in test_a_signal_prints_the_stacks" in (tmp_path / "stacks").read_text()
