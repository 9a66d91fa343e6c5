"""What our rendezvous share, and the one for ranks that all live on this machine."""

from __future__ import annotations

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from everyrank.rendezvous.ports import LOOPBACK, listen
from everyrank.rendezvous.stores import host_store


class FixedRendezvous(RendezvousHandler):
    """A rendezvous of a fixed set of nodes: it never closes, and there is nobody to tell who leaves."""

    _run_id: str

    @property
    def use_agent_store(self) -> bool:
        """The ranks connect to a store that an agent holds: none of them listens."""
        return True

    def is_closed(self) -> bool:
        """A fixed set of nodes never closes."""
        return False

    def set_closed(self) -> None:
        """Nothing to tell."""

    def get_run_id(self) -> str:
        """The run's id."""
        return self._run_id

    def leave(self) -> None:
        """Leave because this node was told to: nothing to tell a fixed set of nodes."""
        self.shutdown()


class LoopbackRendezvous(FixedRendezvous):
    """One node, one agent, nothing to configure: each round gets a fresh store that listens on 127.0.0.1 only.

    A fresh store for each round is what makes restarts safe: torch 2.13 hands the ranks of a second attempt the first
    attempt's store, where they find the addresses of processes that are gone.
    """

    def __init__(self, run_id: str, port: int = 0) -> None:
        self._run_id = run_id
        self._port = port
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        """Name of the rendezvous backend."""
        return "loopback"

    def next_rendezvous(self) -> RendezvousInfo:
        """Open a fresh store; this node is node 0 of 1."""
        self._store = host_store(listen(self._port, "driver.master_port", loopback=True))
        # The agent still holds the last round's store, so a port that was asked for serves the first round only.
        self._port = 0
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    def num_nodes_waiting(self) -> int:
        """No other node can join."""
        return 0

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        return True
