"""The first thing the processes of a run do together: agree on who is here.

A store may be older than the run: torch's elastic agent keeps one store through all restarts, and a shared file
outlives a crash. Keys left in it lead to dead addresses. So rank 0 starts a *generation*, hears every rank's hello and
answers its one-time token; a rank of an earlier attempt cannot answer back. All later keys carry the generation.

The roll call also finds what would otherwise be a hang or a riddle: ranks that do not come, worlds of different size,
different versions, two ranks on one GPU.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from everyrank import __version__
from everyrank.errors import RendezvousError
from everyrank.runtime.process_environment import ProcessEnvironment

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.001, 0.05
_GRACE_S = 5.0  # others wait so much longer than rank 0, whose verdict names who is missing


def call_the_roll(
    store: dist.Store, environment: ProcessEnvironment, timeout_s: float, endpoint: str, gpu: str = ""
) -> tuple[dist.Store, list[str]]:
    """Wait until every rank is here and agree on a fresh part of the store.

    Args:
        store: Where the processes meet; may hold keys of earlier attempts.
        environment: This process's place in the run.
        timeout_s: How long to wait for the others.
        endpoint: Where the store is, for messages.
        gpu: Identity of this rank's GPU where no two ranks may share one, else empty.

    Returns:
        A store whose keys belong to this attempt alone, and for each rank where it runs.

    Raises:
        RendezvousError: Ranks are missing or do not fit together. All ranks that came raise it and name them.
    """
    rank, deadline = environment.rank, time.monotonic() + timeout_s
    token = secrets.token_hex(8)
    hello = {
        "token": token,
        "world_size": environment.world_size,
        "place": f"pid {os.getpid()} on {socket.gethostname()}",
        "torch": torch.__version__,
        "everyrank": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "gpu": gpu,
    }
    base = dist.PrefixStore("everyrank", store)
    try:
        if rank == 0:
            generation = str(base.add("generation", 1))
            verdict = _gather_hellos(base, generation, hello, environment.world_size, deadline, timeout_s, endpoint)
            base.set(f"verdict/{generation}", json.dumps(verdict))
        else:
            base.set(f"hello/{rank}", json.dumps(hello))
            generation = _read(base, f"answer/{token}", deadline + _GRACE_S)
            base.add(f"here/{generation}/{rank}", 1)
            verdict = json.loads(_read(base, f"verdict/{generation}", deadline + 2 * _GRACE_S))
    except (dist.DistError, RuntimeError) as error:
        raise RendezvousError(
            f"rank {rank} of {environment.world_size} waited {timeout_s:g} s at {endpoint}, and rank 0 did not call "
            "the roll. To mend it: look at rank 0's log; check that all processes use the same master address and "
            "port, or raise timeout_s."
        ) from error
    if verdict["problem"]:
        raise RendezvousError(verdict["problem"])
    fresh = dist.PrefixStore(f"everyrank/group/{generation}", store)
    fresh.set_timeout(timedelta(seconds=timeout_s))
    return fresh, verdict["places"]


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
            f"{names} of {world_size} did not come to {endpoint} within {timeout_s:g} s. To mend it: look at the logs "
            f"of {names}; check that {world_size} processes were started and that all use the same master address and "
            "port, or raise timeout_s."
        )
        return {"problem": problem, "places": []}
    ordered = [hellos[rank] for rank in range(world_size)]
    return {"problem": _misfit(ordered), "places": [hello["place"] for hello in ordered]}


def _misfit(hellos: list[dict[str, Any]]) -> str:
    """Return what keeps these processes from working together, or an empty string."""
    for field, name in (("world_size", "world size"), ("torch", "torch version"), ("everyrank", "everyrank version")):
        for rank, hello in enumerate(hellos):
            if hello[field] != hellos[0][field]:
                return (
                    f"rank 0 ({hellos[0]['place']}) has {name} {hellos[0][field]}, but rank {rank} ({hello['place']}) "
                    f"has {hello[field]}. To mend it: start all processes with the same {name}."
                )
    seen: dict[tuple[str, str], int] = {}
    for rank, hello in enumerate(hellos):
        gpu = (hello["place"].partition(" on ")[2], hello["gpu"])
        if hello["gpu"] and gpu in seen:
            return (
                f"ranks {seen[gpu]} and {rank} are both on GPU {hello['gpu']} of {gpu[0]}, which nccl refuses. To mend "
                "it: start one process for each GPU, show each process its own, or use backend='gloo'."
            )
        seen[gpu] = rank
    return ""
