"""The store where the nodes of a run meet: hosting it, reaching it, and telling the person who waits for it.

Everything here waits in Python, a moment at a time: torch's store waits in C++, where neither Ctrl-C nor SIGTERM can
end it, and on a link that is cut it waits for ever.
"""

from __future__ import annotations

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
from everyrank.rendezvous.ports import LOOPBACK

T = TypeVar("T")

MISFIT = "misfit"  # key under which a node that does not fit says why

_FIRST_NOTICE_S, _NOTICE_S = 5.0, 30.0
_PROBE_S = 2.0
_ANSWER_S = 15.0  # how long a store that accepted the connection has to speak torch's language


def wait_until(arrived: Callable[[], bool], timeout_s: float, describe: Callable[[], str] | None) -> bool:
    """Wait until ``arrived()``, saying now and then what for.

    Args:
        arrived: Tells whether it has come; called often, must be quick.
        timeout_s: Give up after so many seconds.
        describe: What is waited for, as a sentence without its full stop; None: nothing is said.

    Returns:
        False if it did not come in time.
    """
    started = time.monotonic()
    next_notice, pause_s = started + _FIRST_NOTICE_S, 0.01
    while not arrived():
        now = time.monotonic()
        if now - started > timeout_s:
            return False
        if describe is not None and now >= next_notice:
            print(f"notice: {describe()}; {timeout_s - (now - started):.0f} s left", file=sys.stderr, flush=True)
            next_notice = now + _NOTICE_S
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)
    return True


class NoAnswerError(TimeoutError):
    """Nothing answers where a store should be; its text is the reason."""


def open_client(
    host: str, port: int, timeout_s: float, describe: Callable[[str], str] | None = None, **options: Any
) -> TCPStore:
    """Connect to a store that another process serves, waiting until it is there.

    torch is asked when something answers at the address: until then it would wait in C++, and say why it gave up on
    the standard error, in pages. For a server that accepts and then says nothing it would wait for ever.

    Args:
        host: The server's host.
        port: Its port.
        timeout_s: Give up after so many seconds.
        describe: What is waited for, given the reason that it does not answer yet: said now and then. None: silent.
        **options: For torch's ``TCPStore``.

    Raises:
        NoAnswerError: Nothing answers in time.
        Exception: Something answers, but not as a store.
    """
    deadline, reason = time.monotonic() + timeout_s, ""

    def answers() -> bool:
        nonlocal reason
        reason = why_unreachable(host, port, min(_PROBE_S, max(deadline - time.monotonic(), 0.01)))
        return not reason

    if not wait_until(answers, timeout_s, describe and (lambda: describe(reason))):
        raise NoAnswerError(reason)
    last_s = min(time.monotonic() + _ANSWER_S, max(deadline, time.monotonic()) + _PROBE_S)

    def check_answer() -> None:
        if time.monotonic() > last_s:
            raise TimeoutError("it accepts connections and says nothing")

    options = {"timeout": timedelta(seconds=_ANSWER_S), "wait_for_workers": False, **options}
    return in_thread(lambda: TCPStore(host, port, is_master=False, **options), check_answer)


def connect(host: str, port: int, timeout_s: float, whose: str, settings: str) -> TCPStore:
    """Connect to a store that another node hosts, waiting until it is there and saying so.

    Args:
        host: Its host.
        port: Its port.
        timeout_s: Give up after so many seconds.
        whose: Who hosts it, for messages.
        settings: The keys that named it, for messages.

    Raises:
        RendezvousError: It cannot be reached in time, or is no such store.
    """
    try:
        return open_client(host, port, timeout_s, lambda reason: f"waiting for {whose} at {host}:{port} ({reason})")
    except NoAnswerError as error:
        raise RendezvousError(
            f"{whose} could not be reached at {host}:{port} within {timeout_s:g} s ({error}). "
            f"Fix: check that it runs, that {settings} name it, the same on every node, and that no firewall "
            f"stops TCP between the nodes; raise driver.rdzv_timeout_s if it starts later than that."
        ) from error
    except (DistError, RuntimeError, TimeoutError, ValueError) as error:
        raise RendezvousError(
            f"something listens at {host}:{port}, but it is no store of torch.distributed: another program has the "
            f"port. Fix: choose another port in {settings}, the same on every node."
        ) from error


def host_store(listener: socket.socket) -> TCPStore:
    """A store served by this process on a listening socket, which it takes over."""
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,  # reaches a socket on loopback, and one on all addresses as well
        port,
        is_master=True,
        timeout=timedelta(seconds=_ANSWER_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def check_alike(store: Store, settings: Mapping[str, Any], waits_s: float = 0.0) -> None:
    """Compare this node with the first that came: versions, and settings that must be the same on every node.

    Args:
        store: Where the nodes meet.
        settings: The settings, by configuration key.
        waits_s: How long this node waits for another to be the first; 0: it may be the first itself.

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
    if waits_s:
        store.wait(["first-node"], timedelta(seconds=waits_s))
    first_node, first = json.loads(store.compare_set("first-node", "", json.dumps([node, mine])))
    for name, value in mine.items():
        if first.get(name) != value:
            message = (
                f"node {first_node}, which came first, has {name} {first.get(name)}, but node {node} has {value}. "
                f"Fix: give every node the same {name}."
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
