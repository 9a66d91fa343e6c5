"""Which network interface carries a run's traffic, found without external commands."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

_PROBE_PORT = 9  # discard: a UDP connect sends nothing, it only asks the kernel for the route
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_SOMEWHERE_ELSE = "192.0.2.1"  # RFC 5737 documentation address: never local, so the default route answers for it


def loopback_interface() -> str:
    """Return the name of the loopback interface."""
    return "lo0" if sys.platform == "darwin" else "lo"


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


def addresses_of(host: str) -> list[str]:
    """Return the IP addresses ``host`` resolves to, in the resolver's order; empty if it does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_local_address(address: str) -> bool:
    """Tell whether an IP address belongs to this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def is_this_host(host: str) -> bool:
    """Tell whether ``host`` resolves to an address of this machine."""
    return any(is_local_address(address) for address in addresses_of(host))


def interface_towards(addr: str) -> str | None:
    """Return the name of the network interface through which this machine reaches ``addr``.

    On the host that owns ``addr`` this is the interface that carries the address, not the loopback. Where the name
    resolves to the loopback (as Debian's 127.0.1.1), the interface of the default route is returned, since other nodes
    cannot come that way.

    Args:
        addr: Host name or IP address, usually the run's master.

    Returns:
        The interface's name, or None if there is no route, or on systems whose interfaces cannot be asked (not Linux).
    """
    for target in addresses_of(addr):
        source = _source_address(target)
        if source is not None and not source.startswith("127.") and source != "::1":
            return _interface_with(source)
    source = _source_address(_SOMEWHERE_ELSE)
    return _interface_with(source) if source else None


def _source_address(target: str) -> str | None:
    """Return the local address from which this machine would speak to ``target``."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, _PROBE_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _interface_with(address: str) -> str | None:
    """Return the name of the interface that has ``address``, or None."""
    if not sys.platform.startswith("linux"):
        return None
    if ":" in address:
        return _interface_with_ipv6(address)
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _interface_with_ipv6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        fields = line.split()
        if fields[0] == wanted:
            return fields[-1]
    return None
