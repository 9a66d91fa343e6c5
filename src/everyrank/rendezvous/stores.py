"""The store where the nodes of a run meet: hosting it, reaching it, and telling the person who waits for it.

Everything here waits in Python, a moment at a time: torch's store waits in C++, where neither Ctrl-C nor SIGTERM can
end it, and on a link that is cut it waits for ever.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import DistError, Store, TCPStore

from everyrank import __version__
from everyrank.errors import RendezvousError
from everyrank.rendezvous.interfaces import address_towards, is_loopback_address, why_unreachable, wrong_interface

T = TypeVar("T")

MISFIT = "misfit"  # key under which a node that does not fit says why

_FIRST_NOTICE_S, _NOTICE_S = 5.0, 30.0
_PROBE_S = 2.0
_ANSWER_S = 15.0  # how long a store that accepted the connection has to speak torch's language
_BACKLOG = 4096


def wait_until(arrived: Callable[[], bool], timeout_s: float, describe: Callable[[], str]) -> bool:
    """Wait until ``arrived()``, saying now and then what for.

    Args:
        arrived: Tells whether it has come; called often, must be quick.
        timeout_s: Give up after so many seconds.
        describe: What is waited for, as a sentence without its full stop.

    Returns:
        False if it did not come in time.
    """
    started = time.monotonic()
    next_notice, pause_s = started + _FIRST_NOTICE_S, 0.01
    while not arrived():
        now = time.monotonic()
        if now - started > timeout_s:
            return False
        if now >= next_notice:
            print(f"notice: {describe()}; {timeout_s - (now - started):.0f} s left", file=sys.stderr, flush=True)
            next_notice = now + _NOTICE_S
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)
    return True


def connect(host: str, port: int, timeout_s: float, whose: str, settings: str) -> TCPStore:
    """Connect to a store that another node hosts, waiting until it is there.

    Args:
        host: Its host.
        port: Its port.
        timeout_s: Give up after so many seconds.
        whose: Who hosts it, for messages.
        settings: The keys that named it, for messages.

    Raises:
        RendezvousError: It cannot be reached in time, or is no such store.
    """
    reason = ""

    def answers() -> bool:
        nonlocal reason
        reason = why_unreachable(host, port)
        return not reason

    if not wait_until(answers, timeout_s, lambda: f"waiting for {whose} at {host}:{port} ({reason})"):
        raise RendezvousError(
            f"{whose} could not be reached at {host}:{port} within {timeout_s:g} s ({reason}). "
            f"To mend it: check that it runs, that {settings} name it, the same on every node, and that no firewall "
            f"stops TCP between the nodes; raise driver.rdzv_timeout_s if it starts later than that."
        )
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_ANSWER_S), wait_for_workers=False)
    except (DistError, RuntimeError, ValueError) as error:
        raise RendezvousError(
            f"something listens at {host}:{port}, but it is no store of torch.distributed: another program has the "
            f"port. To mend it: choose another port in {settings}, the same on every node."
        ) from error


def listen(port: int, key: str) -> socket.socket:
    """A socket that listens on ``port`` (0: any free one) of all addresses of this machine.

    Raises:
        RendezvousError: The port is taken.
    """
    dual = socket.has_dualstack_ipv6()
    listener = socket.socket(socket.AF_INET6 if dual else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::" if dual else "0.0.0.0", port))
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        found = "is in use by another process" if error.errno == errno.EADDRINUSE else "needs privileges"
        raise RendezvousError(
            f"{key}={port} was set, but port {port} of this machine {found}. To mend it: set another port, the same "
            f"on every node, or end the program that has it (ss -tlnp 'sport = :{port}' names it)."
        ) from error
    listener.listen(_BACKLOG)
    return listener


def host_store(listener: socket.socket) -> TCPStore:
    """A store served by this process on a listening socket, which it takes over."""
    port = listener.getsockname()[1]
    return TCPStore(
        "localhost",
        port,
        is_master=True,
        timeout=timedelta(seconds=_ANSWER_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def check_alike(store: Store, settings: Mapping[str, Any]) -> None:
    """Compare this node with the first that came: versions, and settings that must be the same on every node.

    Args:
        store: Where the nodes meet.
        settings: The settings, by configuration key.

    Raises:
        RendezvousError: They differ; both nodes and both values are named, also under the key ``misfit``.
    """
    node = socket.gethostname()
    mine = {
        "torch": torch.__version__,
        "everyrank": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **settings,
    }
    first_node, first = json.loads(store.compare_set("first-node", "", json.dumps([node, mine])))
    for name, value in mine.items():
        if first.get(name) != value:
            message = (
                f"node {first_node}, which came first, has {name} {first.get(name)}, but node {node} has {value}. "
                f"To mend it: give every node the same {name}."
            )
            store.set(MISFIT, message)
            raise RendezvousError(message)


def check_interface(store: Store, host: str) -> None:
    """Refuse a network interface that cannot carry the run, before the ranks time out on it.

    Raises:
        RendezvousError: It does not exist, or leads nowhere; also told under the key ``misfit``.
    """
    here = address_towards(host)
    on_one_machine = here is None or is_loopback_address(here)
    problem = wrong_interface(os.environ, None if on_one_machine else host)
    if problem:
        store.set(MISFIT, problem)
        raise RendezvousError(problem)


def in_thread(call: Callable[[], T], still_there: Callable[[], None]) -> T:
    """Return ``call()``, made in a thread of its own so that this one can be interrupted.

    Args:
        call: May wait in C++ for a store.
        still_there: Called now and then; raises if the wait has become pointless.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="everyrank-rendezvous", daemon=True)
    thread.start()
    next_look = time.monotonic() + _PROBE_S
    while thread.is_alive():
        thread.join(0.02)
        if time.monotonic() >= next_look:
            still_there()
            next_look = time.monotonic() + _PROBE_S
    if errors:
        raise errors[0]
    return results[0]
