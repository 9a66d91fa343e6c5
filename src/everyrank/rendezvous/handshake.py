"""The first thing the processes of a run do together: agree on who is here.

A store may be older than the run: torch's elastic agent keeps one store through all restarts, and a shared file
outlives a crash. Keys left in it lead to dead addresses. So rank 0 starts a *generation*, hears every rank's hello and
answers its one-time token; a rank of an earlier attempt cannot answer back. All later keys carry the generation.

The handshake also finds what would otherwise be a hang or a riddle: ranks that do not come, worlds of different size,
different versions, a network interface that does not exist, two ranks on one GPU.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from everyrank import __version__
from everyrank.errors import RendezvousError
from everyrank.launch_env.process_environment import ProcessEnvironment
from everyrank.rendezvous.init_method import RendezvousStore, open_store
from everyrank.rendezvous.interfaces import machine_identity, wrong_interface


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """The processes of a run, all here.

    Attributes:
        rendezvous: Where they met.
        store: Key-value store of this attempt alone.
        places: For each rank where it runs, for messages: ``"pid 7 on node1"``.
        main_host: Host name of rank 0.
        delegates: The first rank of each machine (or network namespace), so rank 0 first.
    """

    rendezvous: RendezvousStore
    store: dist.Store
    places: list[str]
    main_host: str
    delegates: list[int]

    @property
    def on_one_machine(self) -> bool:
        """Whether all are on one machine (and in one network namespace), so that loopback reaches all."""
        return len(self.delegates) == 1


_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.001, 0.05
_GRACE_S = 5.0  # others wait so much longer than rank 0, whose verdict names who is missing


def shake_hands(
    environment: ProcessEnvironment, init_method: str, timeout_s: float, environ: Mapping[str, str], gpu: str = ""
) -> Handshake:
    """Open the store, wait until every rank is here, and agree on a fresh part of the store.

    Args:
        environment: This process's place in the run.
        init_method: ``env://``, ``tcp://HOST:PORT`` or ``file:///PATH``.
        timeout_s: How long to wait for the store and for the others.
        environ: Environment variables.
        gpu: Identity of this rank's GPU where no two ranks may share one, else empty.

    Returns:
        Where they met, a store whose keys belong to this attempt alone, and who is here.

    Raises:
        UserError: As :func:`everyrank.rendezvous.init_method.open_store`.
        RendezvousError: Ranks are missing or do not fit together. All ranks that came raise it and name them.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        rendezvous = open_store(environment, init_method, max(deadline - time.monotonic(), 0.1), environ)
        try:
            hello = _hello(environment, environ, gpu)
            return _exchange(rendezvous, environment, deadline, timeout_s, hello)
        except dist.DistNetworkError as error:
            # The server went away while it was talked to. Perhaps it was that of the group this program has just left,
            # and the new one on the same port is about to come.
            if environment.rank == 0 or time.monotonic() > deadline:
                raise _unanswered(environment, timeout_s, rendezvous.endpoint) from error


def _hello(environment: ProcessEnvironment, environ: Mapping[str, str], gpu: str) -> dict[str, Any]:
    """What this rank says of itself."""
    master = environment.master_addr or "the other ranks"
    return {
        "token": secrets.token_hex(8),
        "world_size": environment.world_size,
        "place": f"pid {os.getpid()} on {socket.gethostname()}",
        "host": socket.gethostname(),
        "machine": machine_identity(),
        "torch": torch.__version__,
        "everyrank": __version__,
        "gpu": gpu,
        # Which of the two holds is known when all are here.
        "wrong_interface": {
            "alone": wrong_interface(environ, None, nccl=bool(gpu)),
            "among others": wrong_interface(environ, master, nccl=bool(gpu)),
        },
    }


def _exchange(
    rendezvous: RendezvousStore,
    environment: ProcessEnvironment,
    deadline: float,
    timeout_s: float,
    hello: dict[str, Any],
) -> Handshake:
    rank, endpoint, token = environment.rank, rendezvous.endpoint, hello["token"]
    base = dist.PrefixStore("everyrank", rendezvous.store)
    try:
        if rank == 0:
            generation = str(base.add("generation", 1))
            verdict = _gather_hellos(base, generation, hello, environment.world_size, deadline, timeout_s, endpoint)
            base.set(f"verdict/{generation}", json.dumps(verdict))
            if verdict["problem"]:
                _wait_for_readers(base, generation, verdict["num_here"] - 1)
        else:
            base.set(f"hello/{rank}", json.dumps(hello))
            generation = _read(base, f"answer/{token}", deadline + _GRACE_S)
            base.add(f"here/{generation}/{rank}", 1)
            verdict = json.loads(_read(base, f"verdict/{generation}", deadline + 2 * _GRACE_S))
            if verdict["problem"]:
                base.add(f"read/{generation}", 1)
    except dist.DistNetworkError:
        raise
    except (dist.DistError, RuntimeError) as error:
        raise _unanswered(environment, timeout_s, endpoint) from error
    if verdict["problem"]:
        raise RendezvousError(verdict["problem"])
    fresh = dist.PrefixStore(f"everyrank/group/{generation}", rendezvous.store)
    fresh.set_timeout(timedelta(seconds=timeout_s))
    return Handshake(
        rendezvous=rendezvous,
        store=fresh,
        places=verdict["places"],
        main_host=verdict["main_host"],
        delegates=verdict["delegates"],
    )


def _unanswered(environment: ProcessEnvironment, timeout_s: float, endpoint: str) -> RendezvousError:
    return RendezvousError(
        f"rank {environment.rank} of {environment.world_size} came to {endpoint}, but rank 0 did not answer "
        f"within {timeout_s:g} s. Fix: look at rank 0's log; check that all processes use the same master "
        "address and port, or raise timeout_s."
    )


def _read(store: dist.Store, key: str, deadline: float) -> str:
    store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
    return store.get(key).decode()


def _gather_hellos(
    store: dist.Store,
    generation: str,
    own: dict[str, Any],
    world_size: int,
    deadline: float,
    timeout_s: float,
    endpoint: str,
) -> dict[str, Any]:
    """On rank 0: answer hellos until every rank has answered back, and judge whether they fit together."""
    hellos: dict[int, dict[str, Any]] = {0: own}
    answered: set[str] = set()
    waiting, poll_s = set(range(1, world_size)), _SHORTEST_POLL_S
    while waiting and time.monotonic() < deadline:
        before = len(answered), len(waiting)
        for rank in sorted(waiting):
            if not store.check([f"hello/{rank}"]):
                continue
            hello = json.loads(store.get(f"hello/{rank}"))
            if hello["token"] not in answered:
                answered.add(hello["token"])
                store.set(f"answer/{hello['token']}", generation)
            if store.check([f"here/{generation}/{rank}"]):
                hellos[rank] = hello
                waiting.discard(rank)
        poll_s = _SHORTEST_POLL_S if before != (len(answered), len(waiting)) else min(2 * poll_s, _LONGEST_POLL_S)
        if waiting:
            time.sleep(poll_s)
    if waiting:
        names = ("ranks " if len(waiting) > 1 else "rank ") + ", ".join(map(str, sorted(waiting)))
        problem = (
            f"{names} of {world_size} did not come to {endpoint} within {timeout_s:g} s. Fix: look at the logs "
            f"of {names}; check that {world_size} processes were started and that all use the same master address and "
            "port, or raise timeout_s."
        )
        return {"problem": problem, "num_here": len(hellos)}
    ordered = [hellos[rank] for rank in range(world_size)]
    machines = [hello["machine"] for hello in ordered]
    delegates = [machines.index(machine) for machine in dict.fromkeys(machines)]
    return {
        "problem": _misfit(ordered, on_one_machine=len(delegates) == 1),
        "num_here": world_size,
        "places": [hello["place"] for hello in ordered],
        "main_host": own["host"],
        "delegates": delegates,
    }


def _wait_for_readers(store: dist.Store, generation: str, num_readers: int) -> None:
    """On rank 0, before it fails and takes the store with it: let the others read why."""
    deadline = time.monotonic() + _GRACE_S
    while store.add(f"read/{generation}", 0) < num_readers and time.monotonic() < deadline:
        time.sleep(_SHORTEST_POLL_S)


def _misfit(hellos: list[dict[str, Any]], *, on_one_machine: bool) -> str:
    """Return what keeps these processes from working together, or an empty string."""
    for field, name in (("world_size", "world size"), ("torch", "torch version"), ("everyrank", "everyrank version")):
        for rank, hello in enumerate(hellos):
            if hello[field] != hellos[0][field]:
                return (
                    f"rank 0 ({hellos[0]['place']}) has {name} {hellos[0][field]}, but rank {rank} ({hello['place']}) "
                    f"has {hello[field]}. Fix: start all processes with the same {name}."
                )
    wrong = (hello["wrong_interface"]["alone" if on_one_machine else "among others"] for hello in hellos)
    if problem := next(filter(None, wrong), ""):
        return str(problem)
    seen: dict[tuple[str, str], int] = {}
    for rank, hello in enumerate(hellos):
        gpu = (hello["machine"], hello["gpu"])
        if hello["gpu"] and gpu in seen:
            return (
                f"ranks {seen[gpu]} and {rank} are both on GPU {hello['gpu']} of {hello['host']}, which nccl refuses. "
                "Fix: start one process for each GPU, show each process its own, or use backend='gloo'."
            )
        seen[gpu] = rank
    return ""
