"""Which network interface carries a run's traffic, found without external commands."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from everyrank.rendezvous.interfaces import interface_towards, loopback_interface


def machine_identity() -> str:
    """Return a name that two processes share exactly if loopback joins them: same boot, same network namespace."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):  # neither exists outside of Linux
        name += f"/{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/net')}"
    return name


def choose_interfaces(
    environ: Mapping[str, str], *, on_one_machine: bool, towards: str, backend: str
) -> tuple[dict[str, str], str]:
    """Choose the network interface of each backend: loopback on one machine, else the one that leads to the master.

    Args:
        environ: Environment variables; an interface the user has set there stays.
        on_one_machine: Whether all processes of the run are on this machine.
        towards: Host of rank 0.
        backend: Backend of the process group.

    Returns:
        The variables to set, and a sentence for the log.
    """
    found = loopback_interface() if on_one_machine else interface_towards(towards)
    why = "all ranks are on this machine" if on_one_machine else f"the route to {towards}"
    names = ["GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if "nccl" in backend else [])]
    chosen = {name: found for name in names if found is not None and not environ.get(name)}
    said = [f"{environ[name]} ({name} is set)" for name in names if environ.get(name)]
    said += [f"{found} ({why}) for {name}" for name in chosen]
    return chosen, ", ".join(said) or f"left to {backend}, for {why} is not known"
