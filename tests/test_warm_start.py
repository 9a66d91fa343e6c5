"""A program that the tests start as a fork sees what it sees in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import warm_start

LOOKS = """\
import gc, json, multiprocessing, os, signal, sys, threading, warnings
print(json.dumps({
    "start method": multiprocessing.get_start_method(),
    "process": [multiprocessing.current_process().name, str(multiprocessing.parent_process())],
    "threads": [thread.name for thread in threading.enumerate()],
    "signals": {str(s): str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "session": os.getsid(0) == os.getpid(),
    "descriptors": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:3],
    "stdin": sys.stdin.read(),
    "environment": sorted(os.environ.items()),
    "path": sys.path,
    "argv": sys.argv,
    "cwd": os.getcwd(),
    "gc": [gc.isenabled(), gc.get_threshold()],
    "filters": len(warnings.filters) > 0,
    "umask": os.umask(0),
}))
"""


def test_a_fork_is_as_a_fresh_interpreter(tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text(LOOKS)
    command, env = [sys.executable, "looks.py", "a b", "--c"], {**os.environ, "MINE": "1"}
    fresh = subprocess.run(
        command,
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        start_new_session=True,
    )
    forked = warm_start.run(command, cwd=tmp_path, env=env, timeout_s=60)
    assert forked.returncode == 0, forked.stderr
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)
