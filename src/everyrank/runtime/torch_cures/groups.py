"""Cures of process groups: leaving a gloo group without its deadlock, and a store that listens on loopback.

In torch 2.13 a ``backward()`` leaves a Python object in what gloo's work keeps, and gloo's thread needs Python's lock
to let it go. Two things go wrong when that meets an end:

- ``dist.destroy_process_group()`` while a DistributedDataParallel lives: the model's C++ reducer then holds the group's
  last reference. When the model is freed, its destructor joins gloo's thread while it holds the lock: for ever.
- The end of the interpreter: gloo's thread asks for a lock that nobody will give it, and the process hangs or aborts
  ("terminate called without an active exception").

The cure for the first: Python keeps the group until the reducer is gone, for Python gives its lock free when it drops a
group. For the second: the lock is free, before the interpreter ends, until gloo's threads have nothing left to do.

Where no launcher holds the store (``mpirun``, ``srun``, Ray), rank 0 of a plain program does, and torch then listens on
every address of the machine. If all ranks are on this machine, the store gets a socket that listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from socket import socket
    from typing import Any

_THREAD_NAME = "pt_gloo_runloop"
_LOOK_S = 0.006  # a thread that waits for Python's lock looks again every 5 ms, which the kernel counts
_SETTLE_S = 30.0  # on a machine where a thread that could run is not let for long


def cure_groups(module: Any) -> None:
    import atexit
    import functools

    original = module.destroy_process_group
    if hasattr(original, "_outlives_reducers"):
        return

    last_ids: list[int] = []

    def noting_the_end(leave: Any) -> Any:
        @functools.wraps(leave)
        def left(*args: Any, **kwargs: Any) -> None:
            newest, was_joined = _newest_group(), module.is_initialized()
            leave(*args, **kwargs)
            if was_joined and not module.is_initialized():
                last_ids.append(newest)

        return left

    @functools.wraps(original)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        _keep_for_reducers(list(module._world.pg_map))
        destroy(*args, **kwargs)

    destroy = noting_the_end(original)
    destroy_process_group._outlives_reducers = True  # type: ignore[attr-defined]
    destroy_process_group.last_ids = last_ids  # type: ignore[attr-defined]
    module.destroy_process_group = destroy_process_group
    module._abort_process_group = noting_the_end(module._abort_process_group)
    package: Any = sys.modules["torch.distributed"]
    if getattr(package, "destroy_process_group", None) is original:
        package.destroy_process_group = destroy_process_group
    atexit.register(_settle)
    _meet_on_loopback(sys.modules["torch.distributed.rendezvous"])


def _keep_for_reducers(groups: list[Any]) -> None:
    """Hold each group until the C++ parts of the models that use it are freed.

    A weak reference to an object of C++ is told after that object's destructor has run.
    """
    import gc
    import weakref

    for referrer in gc.get_referrers(*groups) if groups else ():
        attributes = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", {})
        if "reducer" in attributes and "process_group" in attributes:
            for part in (attributes["reducer"], attributes.get("logger")):  # each can be the last to hold the group
                if part is not None:
                    weakref.finalize(part, _let_go, attributes["process_group"]).atexit = False


def _newest_group() -> int:
    """The highest id of a group in torch's Flight Recorder, by which those of the next world are told from it."""
    import pickle

    c10d: Any = sys.modules.get("torch._C._distributed_c10d")
    try:
        trace = pickle.loads(c10d._dump_fr_trace(True, False, False))
    except Exception:  # a torch that has none: no trouble of the program's
        return -1
    return max((int(entry["pg_id"]) for entry in trace.get("entries") or ()), default=-1)


def _let_go(_group: Any) -> None:
    """The caller drops its reference after this."""


def _settle() -> None:
    """Leave Python's lock free until gloo's threads sleep and have not been awake since the look before."""
    import time

    deadline = time.monotonic() + _SETTLE_S
    before: set[tuple[str, str, str]] | None = None
    while time.monotonic() < deadline:
        now = set(_gloo_threads())
        if not now or (now == before and all(state == "S" for _, state, _ in now)):
            return
        before = now
        time.sleep(_LOOK_S)


def _gloo_threads() -> Iterator[tuple[str, str, str]]:
    """Id, state and number of sleeps of each thread of gloo's; nothing where the kernel does not tell (not Linux)."""
    tasks = "/proc/self/task"
    for task in os.listdir(tasks) if os.path.isdir(tasks) else ():
        try:
            with open(f"{tasks}/{task}/comm") as file:
                if file.read().strip() != _THREAD_NAME:
                    continue
            with open(f"{tasks}/{task}/status") as file:
                facts = dict(line.split(":", 1) for line in file.read().splitlines())
            yield task, facts["State"].split()[0], facts["voluntary_ctxt_switches"].strip()
        except (OSError, KeyError):
            continue  # it has ended meanwhile


def _meet_on_loopback(rendezvous: Any) -> None:
    original = rendezvous.TCPStore

    def make_store(*args: Any, **options: Any) -> Any:
        listener = _loopback_listener(options)
        if listener is not None:
            options["master_listen_fd"] = listener.detach()
        return original(*args, **options)

    rendezvous.TCPStore = make_store


def _loopback_listener(options: dict[str, Any]) -> socket | None:
    """A socket for the store that torch is about to serve; None if torch is to open its own."""
    # Some operators of Kubernetes call the master localhost in its own pod: what counts is where the ranks are.
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "")
    host = options.get("host_name", "")
    if not (on_one_machine and options.get("is_master") and (host == "localhost" or host.startswith("127."))):
        return None
    import socket

    try:
        return socket.create_server(("127.0.0.1", options["port"]), backlog=4096)
    except OSError:  # this process serves it already, or the port is taken: torch's to find out
        return None
