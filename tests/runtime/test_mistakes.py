"""What a script of the user's own prints, and its exit code, when it cannot join."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import nightly

HALF_SET = {"RANK": "1"}


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys\nimport everyrank\n{code}"]
    return subprocess.run(
        command, env=os.environ | HALF_SET, capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )


@pytest.mark.parametrize("entry", [nightly("with everyrank.join(): pass"), "everyrank.initialize_ddp(0, 0)"])
def test_a_mistake_that_nobody_catches_is_one_message(entry: str) -> None:
    done = run(entry)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the launch environment ")
    assert "Traceback" not in done.stderr


def test_what_the_user_catches_or_hooks_stays_the_users() -> None:
    caught = run("try:\n  with everyrank.join(): pass\nexcept everyrank.UserError:\n  raise KeyError('mine') from None")
    assert caught.returncode == 1
    assert caught.stderr.startswith("Traceback")
    assert caught.stderr.endswith("KeyError: 'mine'\n")
    hooked = run("sys.excepthook = lambda *error: print('my hook:', error[0].__name__)\nwith everyrank.join(): pass")
    assert (hooked.returncode, hooked.stdout) == (1, "my hook: LaunchEnvironmentError\n")
