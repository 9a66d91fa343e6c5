"""The names and interfaces by which ranks find each other, and a real collective between two of them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence

from everyrank.doctor.check import Check, may_bite
from everyrank.elastic.function import launch
from everyrank.elastic.machine import num_gpus
from everyrank.errors import EveryrankError
from everyrank.rendezvous.interfaces import (
    address_towards,
    addresses_of,
    interface_towards,
    interfaces,
    is_loopback_address,
)

_BYTES, _ROUNDS = 16 * 2**20, 5
_TIMEOUT_S = 60.0


def check_network(peers: Sequence[str]) -> Iterator[Check]:
    """Interfaces, this host's name, and the way to other hosts.

    Args:
        peers: Hosts that will take part in runs.
    """
    shown = ", ".join(f"{name} ({addresses[0]})" for name, addresses in sorted(interfaces().items()) if addresses)
    yield Check("interfaces", "ok", shown or "cannot be asked on this system")
    name = socket.gethostname()
    addresses = addresses_of(name)
    yield may_bite(
        "host name",
        f"{name} is {', '.join(addresses) or 'not known to the resolver'}",
        all(is_loopback_address(address) for address in addresses),
        "runs on one machine are well; on several, name node 0 by an address that the others reach",
    )
    for peer in peers:
        source = address_towards(peer)
        if source is None:
            yield Check(f"way to {peer}", "wrong", "no route, or the name does not resolve", "use an address")
        else:
            yield Check(f"way to {peer}", "ok", f"{interface_towards(peer)} ({source})")


def check_collectives() -> Iterator[Check]:
    """A real all_reduce between two ranks of this machine, on each backend that can run here."""
    backends = ["gloo", *(["nccl"] if num_gpus() > 1 else [])]
    for backend in backends:
        try:
            seconds = launch(_time_all_reduce, backend, nproc_per_node=2)[0]
        except EveryrankError as error:
            last = str(error).strip().splitlines()[-1]
            yield Check(f"all_reduce by {backend}", "wrong", last, "see the message; everyrank run app=hello_dist")
        else:
            rate = _BYTES / seconds / 2**30
            yield Check(
                f"all_reduce by {backend}", "ok", f"{_BYTES >> 20} MiB in {1e3 * seconds:.1f} ms, {rate:.2f} GiB/s"
            )


def _time_all_reduce(backend: str) -> float:
    """Return the median time of an all_reduce, in seconds."""
    import torch
    import torch.distributed as dist

    from everyrank.runtime.process_group import join

    with join(backend=backend, device="cuda" if backend == "nccl" else "cpu", timeout_s=_TIMEOUT_S) as world:
        tensor, times = torch.ones(_BYTES // 4, device=world.device), []
        for _ in range(_ROUNDS):
            started = time.monotonic()
            dist.all_reduce(tensor)
            tensor[0].item()  # waits for the device
            times.append(time.monotonic() - started)
        return sorted(times)[_ROUNDS // 2]
