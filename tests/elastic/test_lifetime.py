"""The kernel ends a process with its parent, by itself: nobody is left who could sweep."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's own, on Linux only")
PARENT = """
import os, time
from everyrank.elastic.lifetime import die_with_parent
told = os.pipe()
child = os.fork()
if child == 0:
    {in_child}
    os.write(told[1], b".")
    time.sleep(600)
os.read(told[0], 1)
print(child, flush=True)
time.sleep(600)
"""


def _child_of_a_killed_parent(in_child: str) -> int:
    """Start a parent and its child, kill the parent, and return a descriptor that is ready when the child has ended."""
    command = [sys.executable, "-c", PARENT.format(in_child=in_child)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    return child


def test_a_child_ends_with_its_parent() -> None:
    child = _child_of_a_killed_parent("die_with_parent(os.getppid())")
    try:
        assert select.select([child], [], [], 10)[0], "it lives on"
    finally:
        os.close(child)


def test_one_whose_parent_is_gone_already_ends_at_once() -> None:
    code = "from everyrank.elastic.lifetime import die_with_parent; die_with_parent(1 << 22); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
