"""What a rank prints reaches the console and the log, however soon the rank and its run end after it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import wait_for, wait_gone
from warm_start import Started

from conftest import nightly
from everyrank.program.output import wait_for_logs

# A rank's children are ended with it, by their session: whoever reads its output must have left that before.
_SHORT = """
import os, sys
from everyrank.program.output import divert_output
os.setsid()
divert_output(sys.argv[1], prefix="", on_console=True)
sessions = [os.getsid(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()]
os.write(2, f"processes in the session: {sessions.count(os.getpid())}\\n".encode())
"""


def test_the_reader_of_a_rank_is_in_no_session_of_the_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SHORT, str(tmp_path / "rank-0.log")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "processes in the session: 1\n"
    assert (tmp_path / "rank-0.log").read_text() == done.stderr


_LINES = """
import sys
from everyrank.program.output import divert_output
divert_output(sys.argv[1], prefix=sys.argv[2], on_console=True)
for block in range(40):
    sys.stdout.write("".join(sys.argv[2] * (1 + line % 99) + "\\n" for line in range(400)))
"""


def test_lines_of_two_ranks_do_not_run_into_each_other_on_a_full_console(tmp_path: Path) -> None:
    """A pipe takes no more than PIPE_BUF bytes at once: a longer write lets the other rank's lines in."""
    reading, writing = os.pipe()
    ranks = [
        subprocess.Popen([sys.executable, "-c", _LINES, str(tmp_path / f"{name}.log"), name], stdout=writing)
        for name in "ab"
    ]
    os.close(writing)
    with open(reading) as console:
        lines = console.read().splitlines()
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert {len(set(line)) for line in lines} == {1}, [line for line in lines if len(set(line)) != 1][:5]
    expected = [2 + line % 99 for line in range(400)] * 40  # the prefix, and the line
    assert [len(line) for line in lines if line[0] == "a"] == expected
    assert [len(line) for line in lines if line[0] == "b"] == expected


@pytest.mark.parametrize("driver", ["torchrun", nightly("spawn")])
def test_a_console_that_is_read_late_shows_all_that_was_printed(
    start_cli: Callable[..., Started], tmp_path: Path, driver: str
) -> None:
    """More than a pipe holds of two ranks: they are gone before their last lines are taken."""
    (tmp_path / "prints.py").write_text(
        "import os, pathlib\nprint(*range(12000), sep='\\n', flush=True)\n"
        "said = pathlib.Path('said-' + os.environ['RANK'])\n"
        "said.write_text(str(os.getpid()))\nsaid.rename(said.name + '.all')\n"
    )
    process = start_cli(f"driver={driver}", "driver.nproc_per_node=2", "--", "prints.py")
    ranks = [int(wait_for(tmp_path / f"said-{rank}.all").read_text()) for rank in (0, 1)]
    assert wait_gone(ranks) == []
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert sorted(int(line) for line in shown.splitlines() if line.isdigit()) == sorted([*range(12000)] * 2)
    logs = list(tmp_path.glob("outputs/*/logs/rank-*.log"))
    wait_for_logs([str(log) for log in logs])
    assert [log.read_text().splitlines()[-1] for log in logs] == ["11999", "11999"]
