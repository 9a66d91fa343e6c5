"""Everything a process prints is in its log, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, subprocess, sys
from everyrank.runtime.output import tee_output
print("before")
with tee_output(sys.argv[1]):
    print("out"); print("err", file=sys.stderr)
    sys.stdout.buffer.write("bytes ü\\n".encode())
    subprocess.run(["echo", "child"], check=True)
    os.write(2, b"from C\\n")
    print("\\r 10%\\r 50%", end=""); print("\\r\\x1b[32m100%\\x1b[0m")
    print("console alone", file=sys.__stdout__)
    assert not sys.stdout.isatty() and sys.stdout.encoding.lower() == "utf-8"
    print("handed on", flush=True); subprocess.run(["echo", "to the console"], stdout=sys.stdout, check=True)
    print("unfinished", end="")
    sys.stdout.flush()
    eval(sys.argv[2])
print(" after")
"""


def _run(tmp_path: Path, ending: str) -> tuple[subprocess.CompletedProcess[str], str]:
    log = tmp_path / "logs" / "rank-0.log"
    command = [sys.executable, "-X", "utf8", "-X", "faulthandler", "-c", PROGRAM, str(log), ending]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False), log.read_text()


def test_both_places_get_what_python_prints_and_the_log_all_else(tmp_path: Path) -> None:
    done, log = _run(tmp_path, "None")
    assert (done.returncode, done.stderr) == (0, "err\n")
    for line in ("before", "out", "bytes ü", "console alone", "handed on", "to the console", "unfinished after"):
        assert line in done.stdout.splitlines()
    assert sorted(log.splitlines()) == sorted(
        ["out", "err", "bytes ü", "child", "from C", "100%", "handed on", "unfinished"]
    )


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("os.abort()", -6, "Fatal Python error: Aborted"),
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("os._exit(3)", 3, ""),
    ],
)
def test_nothing_is_lost_when_the_process_is_killed(ending: str, code: int, said: str, tmp_path: Path) -> None:
    done, log = _run(tmp_path, ending)
    assert done.returncode == code
    for line in ("out", "err", "bytes ü", "child", "from C", "100%", "unfinished", said):
        assert line in log


def test_a_restarted_rank_goes_on_in_the_same_file(tmp_path: Path) -> None:
    _run(tmp_path, "os._exit(1)")
    _, log = _run(tmp_path, "None")
    assert log.count("from C") == 2


def test_an_exception_passes_and_the_streams_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from everyrank.runtime.output import tee_output

    before = sys.stdout, sys.stderr, sys.__stdout__

    def fail() -> None:
        with tee_output(tmp_path / "log"):
            print("seen twice")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (sys.stdout, sys.stderr, sys.__stdout__) == before
    assert capsys.readouterr().out == "seen twice\n"
    assert (tmp_path / "log").read_text() == "seen twice\n"
