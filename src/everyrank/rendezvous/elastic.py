"""Rendezvous of nodes that come and go: torch's c10d rendezvous, and what it lacks.

The rendezvous itself is torch's ``DynamicRendezvousHandler``. Around it:

- each round has a store of its own for the ranks, held by the first node's agent. Torch 2.13 publishes one in the
  first round only: a late joiner waits for it for ever, and a restart finds dead addresses in it;
- a node that goes away is noticed by its missing keep-alives, not only when a collective times out;
- a store that cannot be reached any more is an error after seconds, where torch waits in C++ without end;
- this node's address is the one on the way to the store, not whatever its host name resolves to.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous import RendezvousError as TorchRendezvousError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
    _RendezvousExitOp,
)

from everyrank.errors import ProcessGroupError, RendezvousError
from everyrank.rendezvous import stores
from everyrank.rendezvous.interfaces import address_towards, is_this_host, why_unreachable
from everyrank.rendezvous.ports import listen

# torch waits 15 s for a silent node. Two missed keep-alives of a second were seen to split a job in two; four were not.
_KEEP_ALIVE_S, _MAX_MISSED = 1, 4
_CONTACT_S = 10.0  # a store that has not answered for so long is lost
_SURE_S = 2.0
_LOOK_S = 0.25
_PLACE_S = 20.0


class ElasticRendezvous(RendezvousHandler):
    """The rendezvous of one node.

    Args:
        host: Host of the store: the node that has this address serves it.
        port: Its port.
        run_id: The run's id, the same on every node.
        min_nodes: Start with so many nodes.
        max_nodes: Take in no more.
        timeout_s: How long to wait until there are enough.
        last_call_s: How long to wait then for further ones.
    """

    def __init__(
        self,
        host: str,
        port: int,
        run_id: str,
        min_nodes: int,
        max_nodes: int,
        timeout_s: float,
        last_call_s: float,
    ) -> None:
        self._host, self._port, self._endpoint = host, port, f"{host}:{port}"
        self._run_id = run_id
        self._min_nodes, self._max_nodes = min_nodes, max_nodes
        self._timeout_s, self._last_call_s = timeout_s, last_call_s
        self._address = "127.0.0.1"
        self._inner: DynamicRendezvousHandler | None = None
        self._rank_store: TCPStore | None = None
        self._round = 0
        self._watch: _Watch | None = None
        self._doubted_s: float | None = None

    @property
    def attempt(self) -> int:
        """The round, the same on all nodes."""
        return self._round

    def get_backend(self) -> str:
        """Name of the rendezvous backend."""
        return "c10d"

    @property
    def use_agent_store(self) -> bool:
        """The ranks connect to a store that the first node's agent holds: none of them listens."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the nodes that are there now.

        Raises:
            RendezvousError: The store cannot be reached, its port is taken, too few nodes came, nodes do not fit
                together, or the run has ended.
            ProcessGroupError: The store was reached once, and is lost.
        """
        self._stop_watch()
        if self._inner is None:
            self._inner = self._open()
        inner, deadline = self._inner, time.monotonic() + self._timeout_s
        while True:
            try:
                info = stores.in_thread(inner.next_rendezvous, _Contact(self._host, self._port).check)
                self._round = inner._state_holder.state.round
                place = self._place_of_ranks(info)
            except RendezvousClosedError as error:
                raise RendezvousError(
                    f"the run {self._run_id!r} at {self._endpoint} has ended. Fix: start a new one on all "
                    "nodes, with another driver.rdzv_id or another port."
                ) from error
            except RendezvousTimeoutError as error:
                raise RendezvousError(
                    f"fewer than driver.min_nodes={self._min_nodes} nodes came to {self._endpoint} within "
                    f"{self._timeout_s:g} s. Fix: start the other nodes with the same driver.rdzv_endpoint and "
                    f"driver.rdzv_id={self._run_id}, or raise driver.rdzv_timeout_s."
                ) from error
            except (TorchRendezvousError, DistError) as error:
                raise self._lost() from error
            if place is not None:
                self._watch = _Watch(inner, info.world_size)
                return RendezvousInfo(info.store, info.rank, info.world_size, place)
            if time.monotonic() > deadline:
                raise self._lost()

    def _open(self) -> DynamicRendezvousHandler:
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # its sharing strands late joiners; ours replaces it
        store: Store | None = None
        if is_this_host(self._host):
            try:
                store = stores.host_store(listen(self._port, "the port of driver.rdzv_endpoint", loopback=False))
            except RendezvousError as error:
                if why_unreachable(self._host, self._port):
                    raise
                del error  # another node of this run, on this same machine, may have it: then it answers below
        if store is None:
            store = stores.connect(
                self._host, self._port, self._timeout_s, "the node that hosts the store", "driver.rdzv_endpoint"
            )
        self._address = address_towards(self._host) or socket.gethostname()
        stores.check_alike(store, {"driver.min_nodes": self._min_nodes, "driver.max_nodes": self._max_nodes})
        stores.check_interface(store, self._host)
        return DynamicRendezvousHandler.from_backend(
            self._run_id,
            store,
            C10dRendezvousBackend(store, self._run_id),
            self._min_nodes,
            self._max_nodes,
            local_addr=self._address,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=self._timeout_s), last_call=timedelta(seconds=self._last_call_s)
            ),
            keep_alive_interval=_KEEP_ALIVE_S,
            keep_alive_max_attempt=_MAX_MISSED,
        )

    def _place_of_ranks(self, info: RendezvousInfo) -> RendezvousStoreInfo | None:
        """Where the ranks of this round meet; None if the first node went away before it said so."""
        if info.rank == 0:
            self._rank_store = stores.host_store(listen(0, "a port for the ranks", loopback=False))
            info.store.set("everyrank/place", f"{self._address} {self._rank_store.port}")
            return RendezvousStoreInfo(self._address, self._rank_store.port)
        contact = _Contact(self._host, self._port)

        def published() -> bool:
            contact.check()
            return info.store.check(["everyrank/place"])

        if not stores.wait_until(published, _PLACE_S, lambda: "waiting for the first node's word"):
            return None
        address, port_text = info.store.get("everyrank/place").decode().split()
        return RendezvousStoreInfo(address, int(port_text))

    def is_closed(self) -> bool:
        """Whether the run has ended."""
        return self._watch is not None and self._watch.closed

    def set_closed(self) -> None:
        """End the run for all nodes."""
        if self._inner is not None:
            self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """How many nodes wait to come in, or have gone: other than 0, the ranks are started anew."""
        return 0 if self._watch is None else self._watch.num_waiting + self._watch.num_gone

    @property
    def num_gone(self) -> int:
        """How many nodes of this round have gone."""
        return 0 if self._watch is None else self._watch.num_gone

    def check_contact(self) -> None:
        """Raise ProcessGroupError if the store has not answered for 10 s."""
        if self._is_lost():
            raise self._lost()

    def changed(self, wait_s: float) -> bool:
        """Wait a moment for nodes to come or go; for a node whose ranks lost theirs.

        Returns:
            False if the set of nodes stayed as it is, or the run has ended.

        Raises:
            ProcessGroupError: The store is gone, and with it the node that served it.
        """
        deadline = time.monotonic() + wait_s
        while self._watch is not None and time.monotonic() < deadline:
            if self._watch.closed:
                return False
            if self.num_nodes_waiting():
                return True
            time.sleep(0.05)
        if why_unreachable(self._host, self._port):
            raise self._lost()
        return False

    def get_run_id(self) -> str:
        """The run's id."""
        return self._run_id

    def leave(self) -> None:
        """Leave because this node was told to: the others go on without it, and need not wait for its silence."""
        inner = self._inner
        if inner is None or self._is_lost():
            return
        self._stop_watch()

        def go() -> None:
            inner._stop_heartbeats()
            inner._op_executor.run(_RendezvousExitOp(), time.monotonic() + 2)

        _done_within(3, go)

    def shutdown(self) -> bool:
        """End the run for all nodes: this one is done, or has failed for good."""
        inner = self._inner
        if inner is None or self._is_lost():
            return False
        self._stop_watch()
        return _done_within(5, inner.shutdown)

    def _is_lost(self) -> bool:
        """Whether the store is silent. Found twice: this process may have been stopped, or the machine asleep."""
        if self._watch is None or self._watch.silent_s() <= _CONTACT_S:
            self._doubted_s = None
            return False
        self._doubted_s = self._doubted_s or time.monotonic()
        return time.monotonic() - self._doubted_s > _SURE_S

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _lost(self) -> ProcessGroupError:
        reason = why_unreachable(self._host, self._port)
        return ProcessGroupError(
            f"this node ({socket.gethostname()}) has lost the store at {self._endpoint}"
            f"{f' ({reason})' if reason else ''}; without it the nodes cannot agree on who takes part, so this one "
            "stops. Fix: look at the node that has this address, and start the same command again."
        )


def _done_within(seconds: float, call: Callable[[], object]) -> bool:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


class _Contact:
    """Raises when nothing has answered at an address for too long."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._last_s = self._next_s = time.monotonic()

    def check(self) -> None:
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + 2
        reason = why_unreachable(self._host, self._port)
        if not reason:
            self._last_s = time.monotonic()
        elif time.monotonic() - self._last_s > _CONTACT_S:
            raise TorchRendezvousError(reason)


class _Watch:
    """Looks, in a thread of its own, at who takes part; the agent reads what it saw and never waits."""

    def __init__(self, handler: DynamicRendezvousHandler, num_nodes: int) -> None:
        self.num_waiting = self.num_gone = 0
        self.closed = False
        self._handler = handler
        self._num_nodes = num_nodes
        self._round = handler._state_holder.state.round
        self._last_s = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="everyrank-membership", daemon=True)
        self._thread.start()

    def silent_s(self) -> float:
        """Seconds since the store last answered."""
        return time.monotonic() - self._last_s

    def stop(self) -> None:
        """Stop looking; unless the store is silent, nothing touches the handler's state afterwards."""
        self._stopped.set()
        self._thread.join(2)

    def _look(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            try:
                waiting = self._handler.num_nodes_waiting()
            except (TorchRendezvousError, DistError):
                continue  # silent_s grows
            state = self._handler._state_holder.state
            here = len(state.participants) if state.round == self._round else 0
            self.closed = state.closed
            self.num_waiting = 0 if state.closed else waiting
            self.num_gone = 0 if state.closed else max(0, self._num_nodes - here)
            self._last_s = time.monotonic()
