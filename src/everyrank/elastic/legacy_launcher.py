"""``python -m everyrank.elastic.legacy_launcher ARGS``: ``torch.distributed.launch`` for one machine, on loopback.

Its own rendezvous for one machine (``--standalone``) opens a port to the whole network.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.launch import main

from everyrank.elastic.process.leaving import finish_after
from everyrank.rendezvous.loopback import LoopbackRendezvous

_BACKEND = "loopback"  # as LoopbackRendezvous calls itself


def _rendezvous(parameters: RendezvousParameters) -> LoopbackRendezvous:
    return LoopbackRendezvous(parameters.run_id, int(parameters.endpoint.rpartition(":")[2] or 0))


if __name__ == "__main__":
    rendezvous_handler_registry.register(_BACKEND, _rendezvous)
    finish_after(lambda: main([f"--rdzv-backend={_BACKEND}", *sys.argv[1:]]))
