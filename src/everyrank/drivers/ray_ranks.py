"""The ranks of ``driver=ray``: a Ray actor holds the place of each, and runs it as a process of its own.

So a rank is what it is under every other launcher: it has its main thread and its signals to itself, its exit code is
known, and nothing of Ray's is loaded in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from everyrank.errors import EXIT_OK, EXIT_PREEMPTED

_LOOK_S = 0.2


class Place(NamedTuple):
    """Where an actor is.

    Attributes:
        node: Ray's name of the host.
        address: Its address.
        port: A free port there.
        gpus: The devices that Ray has given to the actor.
    """

    node: str
    address: str
    port: int
    gpus: list[str]


class Ended(NamedTuple):
    """How ranks ended.

    Attributes:
        codes: Exit codes of those that ended by themselves, by rank; negative for a signal.
        lost: What Ray says of those whose actor died, by rank.
    """

    codes: dict[int, int]
    lost: dict[int, str]


class Rank:
    """The actor. It is sent by value: Ray's own process need not find everyrank."""

    def __init__(self) -> None:
        self._has_started = threading.Event()

    def place(self) -> tuple[str, str, int, list[str]]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        return context.get_node_id(), ray.util.get_node_ip_address(), port, [str(gpu) for gpu in ray.get_gpu_ids()]

    def run(self, command: list[str], cwd: str, variables: dict[str, str]) -> int:
        environ = {**os.environ, **variables}
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray blocks SIGINT in whatever it starts
        # The Python of this host, which may be elsewhere than that of the launching one.
        self._process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environ, stdin=subprocess.DEVNULL)
        self._has_started.set()
        return self._process.wait()

    def signal(self, signum: int) -> None:
        self._has_started.wait()
        self._process.send_signal(signum)


class Gang:
    """The actors of all ranks, placed together or not at all; for one attempt.

    Args:
        num_ranks: Their number.
        resources: What each is to have.
        waits: Called once, with what the cluster has, if they have no place by then.
        patience_s: Seconds until then.
    """

    def __init__(
        self,
        num_ranks: int,
        resources: Mapping[str, float],
        waits: Callable[[Mapping[str, float]], None],
        patience_s: float,
    ) -> None:
        self._group = placement_group([dict(resources)] * num_ranks, strategy="PACK")
        try:
            if not self._group.wait(patience_s):
                waits(ray.cluster_resources())
                while not self._group.wait(1):  # whole seconds; a signal is heard in between
                    pass
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
            actors = [self._actor(resources, index) for index in range(num_ranks)]
            places = [Place(*found) for found in ray.get([actor.place.remote() for actor in actors])]
        except BaseException:
            self.close()
            raise
        nodes = [place.node for place in places]
        in_order = sorted(range(num_ranks), key=lambda index: nodes.index(nodes[index]))  # those of one host together
        self._places = [places[index] for index in in_order]
        self._actors = [actors[index] for index in in_order]

    def _actor(self, resources: Mapping[str, float], index: int) -> Any:
        return (
            ray.remote(Rank)
            .options(
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                max_concurrency=2,  # one runs the rank, one takes signals for it
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
            )
            .remote()
        )

    def run(self, command: Sequence[str], cwd: str, variables: Mapping[str, str], grace_s: float) -> Ended:
        """Run all ranks to their end; where one fails, the others have ``grace_s`` seconds to end by themselves."""
        own = variables_of(self._places)
        running = {
            actor.run.remote(list(command), cwd, {**variables, **own[rank]}): rank
            for rank, actor in enumerate(self._actors)
        }
        ended, deadline = Ended({}, {}), None
        while running and (deadline is None or time.monotonic() < deadline):
            done, _ = ray.wait(list(running), timeout=_LOOK_S)
            for answer in done:
                rank = running.pop(answer)
                try:
                    ended.codes[rank] = ray.get(answer)
                except RayError as error:
                    ended.lost[rank] = str(error)
            if deadline is None and (ended.lost or set(ended.codes.values()) - {EXIT_OK, EXIT_PREEMPTED}):
                deadline = time.monotonic() + grace_s
        return ended

    def signal(self, signum: int) -> None:
        """Send all ranks a signal."""
        for actor in self._actors:
            actor.signal.remote(signum)

    def close(self) -> None:
        """End the actors, and with them their ranks."""
        with contextlib.suppress(RayError):
            remove_placement_group(self._group)


def variables_of(places: Sequence[Place]) -> list[dict[str, str]]:
    """The variables that torchrun sets, for ranks at these places; those of one host stand together.

    Each rank sees the GPUs of all ranks of its host, its own at the index of its local rank.
    """
    sizes = Counter(place.node for place in places)
    nodes = list(sizes)
    variables = []
    for rank, place in enumerate(places):
        beside = [other for other in places if other.node == place.node]
        first = next(index for index, other in enumerate(places) if other.node == place.node)
        gpus = [gpu for other in beside for gpu in other.gpus]
        variables.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(rank - first),
                "LOCAL_WORLD_SIZE": str(sizes[place.node]),
                "NODE_RANK": str(nodes.index(place.node)),
                "MASTER_ADDR": places[0].address,
                "MASTER_PORT": str(places[0].port),
                **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            }
        )
    return variables
