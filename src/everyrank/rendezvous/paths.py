"""Whether the machines of a run can reach each other, asked before the backends find out the slow way.

Ranks talk to each other on ports of the kernel's choice. Where a firewall lets the master's port through and drops the
rest, or two machines give the same address to a bridge of containers, gloo waits five times its timeout, an hour by
default, and then says "Connect timeout".
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence

import torch.distributed as dist

from everyrank.errors import RendezvousError
from everyrank.rendezvous.interfaces import interfaces, why_unreachable

_PATIENCE_S = 5.0
_READERS_S = 5.0


def check_paths(store: dist.Store, rank: int, places: Sequence[str], delegates: Sequence[int], interface: str) -> None:
    """Let one rank of each machine connect to that of the next one, in a ring.

    Args:
        store: Where all ranks meet.
        rank: This rank.
        places: For each rank where it runs, for messages.
        delegates: One rank of each machine; the first is rank 0. Nothing is asked on a single machine.
        interface: Name of the network interface that carries the run here; nothing is asked of it if it has no address.

    Raises:
        RendezvousError: A machine cannot reach the next one. All ranks raise it.
    """
    if len(delegates) < 2:
        return
    address = next((a for a in interfaces().get(interface, []) if not a.startswith("fe80:")), "")  # these need a zone
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        if rank in delegates:
            if address:
                listener.bind((address, 0))
                listener.listen()
            store.set(f"path/{rank}", json.dumps([address, listener.getsockname()[1] if address else 0]))
            after = delegates[(delegates.index(rank) + 1) % len(delegates)]
            store.set(f"path/{rank}/found", _find_path(store, rank, after, places))
        if rank == 0:
            # Every machine has the last word, so that one that has gone is not taken for one behind a firewall.
            found = [store.get(f"path/{delegate}/found").decode() for delegate in delegates]
            store.set("paths", next(filter(None, found), ""))
        problem = store.get("paths").decode()
    if not problem:
        return
    if rank != 0:
        store.add("paths/read", 1)
    deadline = time.monotonic() + _READERS_S
    while rank == 0 and store.add("paths/read", 0) < len(places) - 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # this rank may take the store with it
    raise RendezvousError(problem)


def _find_path(store: dist.Store, rank: int, after: int, places: Sequence[str]) -> str:
    """Return why the delegate after this one cannot be reached, or an empty string."""
    address, port = json.loads(store.get(f"path/{after}"))
    reason = why_unreachable(address, port, _PATIENCE_S) if address else ""
    if not reason:
        return ""
    return (
        f"rank {rank} ({places[rank]}) cannot reach rank {after} ({places[after]}) at {address}:{port} ({reason}), "
        "though both came to the master. Ranks talk to each other on ports of the kernel's choice. Fix: let TCP "
        "through between the nodes on all ports, or set GLOO_SOCKET_IFNAME to an interface that joins them."
    )
