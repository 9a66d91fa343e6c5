"""Rendezvous of a fixed set of nodes: node 0 is named by all, hosts the store, and every node must come.

torch's own keeps one store for all attempts, lets each node count its attempts for itself and says nothing while it
waits. Here the nodes agree on the attempt, each attempt has a store of its own, and a node that is missing is named.
"""

from __future__ import annotations

import socket
import sys
import time
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo

from everyrank.errors import RendezvousError
from everyrank.rendezvous import stores
from everyrank.rendezvous.interfaces import is_this_host, why_unreachable
from everyrank.rendezvous.loopback import FixedRendezvous
from everyrank.rendezvous.ports import listen

_SETTINGS = "driver.master_addr and driver.master_port"
_LOOK_S = 1.0  # between two looks at whether another node has begun a new attempt


class StaticRendezvous(FixedRendezvous):
    """The rendezvous of one node.

    Args:
        host: Node 0's host.
        port: Node 0's port.
        node_rank: This node.
        num_nodes: All nodes.
        run_id: The run's id.
        timeout_s: How long to wait for the others.
    """

    def __init__(self, host: str, port: int, node_rank: int, num_nodes: int, run_id: str, timeout_s: float) -> None:
        self._host, self._port = host, port
        self._node_rank, self._num_nodes = node_rank, num_nodes
        self._run_id = run_id
        self._timeout_s = timeout_s
        self._store: Store | None = None
        self._rank_store: TCPStore | None = None
        self._round = -1
        self._next_look_s = 0.0

    @property
    def attempt(self) -> int:
        """How many attempts were made before this one, agreed by all nodes."""
        return max(self._round, 0)

    def get_backend(self) -> str:
        """Name of the rendezvous backend."""
        return "static"

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes for the next attempt.

        Raises:
            RendezvousError: Node 0 cannot be reached, its port is taken, a node is missing, or nodes do not fit.
        """
        try:
            return self._meet()
        except DistError as error:
            self._store = None  # node 0 is gone; if it is started again it has a new store
            if self._node_rank == 0:
                raise
            try:
                return self._meet()
            except DistError:
                raise RendezvousError(
                    f"the connection to node 0 at {self._host}:{self._port} was lost. Fix: look at node 0's output."
                ) from error

    def _meet(self) -> RendezvousInfo:
        if self._store is None:
            self._store = self._open()
            self._round = int(self._store.compare_set("round", "", "0"))
        else:
            self._round = int(self._store.compare_set("round", str(self._round), str(self._round + 1)))
        store = PrefixStore(f"round/{self._round}", self._store)
        self._gather(store)
        return RendezvousInfo(store, self._node_rank, self._num_nodes, self._place_of_ranks(store))

    def _open(self) -> Store:
        if self._node_rank == 0:
            if not is_this_host(self._host):
                print(
                    f"notice: driver.node_rank=0 is set here, but driver.master_addr={self._host} is no address of "
                    f"this machine ({socket.gethostname()}); node 0 is the one that the others reach at that address",
                    file=sys.stderr,
                )
            store: Store = stores.host_store(listen(self._port, "driver.master_port", loopback=False))
        else:
            store = stores.connect(self._host, self._port, self._timeout_s, "node 0", _SETTINGS)
        store = PrefixStore(f"everyrank/{self._run_id}", store)
        # Who hosts the store is the first, though another may be quicker to use it.
        stores.check_alike(store, {"driver.nnodes": self._num_nodes}, self._timeout_s if self._node_rank != 0 else 0.0)
        stores.check_interface(store, self._host)
        return store

    def _gather(self, store: Store) -> None:
        """Wait until all nodes are here; node 0 says when."""
        taken_by = store.compare_set(f"node/{self._node_rank}", "", socket.gethostname()).decode()
        if taken_by != socket.gethostname():
            raise RendezvousError(
                f"driver.node_rank={self._node_rank} was set on {socket.gethostname()} and on {taken_by}. "
                f"Fix: number the nodes from 0 to {self._num_nodes - 1}, each once."
            )

        def missing() -> list[int]:
            return [rank for rank in range(self._num_nodes) if not store.check([f"node/{rank}"])]

        def complete() -> bool:
            assert self._store is not None
            if self._store.check([stores.MISFIT]):
                raise RendezvousError(self._store.get(stores.MISFIT).decode())
            return store.check(["go"] if self._node_rank != 0 else [f"node/{rank}" for rank in range(self._num_nodes)])

        def absent() -> str:
            return f"{_nodes(missing())} of {self._num_nodes} did not come to {self._host}:{self._port}"

        if not stores.wait_until(complete, self._timeout_s, lambda: f"{absent()} yet"):
            raise RendezvousError(
                f"{absent()} within {self._timeout_s:g} s. Fix: run the same command "
                f"there with its driver.node_rank, check that driver.nnodes={self._num_nodes} is right, or raise "
                "driver.rdzv_timeout_s."
            )
        if self._node_rank == 0:
            store.set("go", "1")

    def _place_of_ranks(self, store: Store) -> RendezvousStoreInfo:
        """Where the ranks of this attempt meet: the first at the master's port, later ones in a fresh store.

        In the first attempt's store a second one would find the addresses of processes that are gone.
        """
        if self._round == 0:
            return RendezvousStoreInfo(self._host, self._port)
        if self._node_rank == 0:
            self._rank_store = stores.host_store(listen(0, "driver.master_port", loopback=False))
            store.set("port", str(self._rank_store.port))
        store.wait(["port"], timedelta(seconds=self._timeout_s))
        return RendezvousStoreInfo(self._host, int(store.get("port")))

    def num_nodes_waiting(self) -> int:
        """1 if another node has begun a new attempt, which this one must join; else 0."""
        now = time.monotonic()
        if now < self._next_look_s or self._store is None:
            return 0
        self._next_look_s = now + _LOOK_S
        return self._moved_on()

    def changed(self, wait_s: float) -> bool:
        """Wait a moment for another node to begin a new attempt; for a node whose ranks lost theirs."""
        deadline = time.monotonic() + wait_s
        while not self._moved_on():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        self._next_look_s = 0.0
        return True

    def _moved_on(self) -> int:
        # On a link that was cut, asking the store would wait for ever: ask whether it can be reached first.
        if self._store is None or (self._node_rank != 0 and why_unreachable(self._host, self._port)):
            return 0
        try:
            return int(int(self._store.get("round")) > self._round)
        except DistError:
            return 0

    def shutdown(self) -> bool:
        """Close the stores."""
        self._store = self._rank_store = None
        return True


def _nodes(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"node {shown}" if len(ranks) == 1 else f"nodes {shown}"
