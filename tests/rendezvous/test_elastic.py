"""The rendezvous of nodes that come and go, of one node that is stopped for a while."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

_CHECKS = """
import time
from everyrank.rendezvous.elastic import ElasticRendezvous
rendezvous = ElasticRendezvous("127.0.0.1", {port}, "stopped", 1, 1, 60, 2)
rendezvous.next_rendezvous()
print("met", flush=True)
end_s = time.monotonic() + 16
while time.monotonic() < end_s:
    rendezvous.check_contact()
    time.sleep(0.01)
print("in contact", flush=True)
rendezvous.shutdown()
"""


def test_a_node_that_was_stopped_has_not_lost_the_store(free_port: int) -> None:
    """For longer than a store may be silent: nobody has asked it meanwhile. Its ranks may start anew, not end."""
    code = _CHECKS.format(port=free_port)
    node = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert node.stdout is not None
    assert node.stdout.readline() == "met\n"
    os.kill(node.pid, signal.SIGSTOP)
    time.sleep(11)
    os.kill(node.pid, signal.SIGCONT)
    assert node.communicate(timeout=60)[0] == "in contact\n"
