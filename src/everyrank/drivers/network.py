"""Addresses of this machine, for the process that launches; no torch here."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys

from everyrank.errors import DriverError

DEFAULT_PORT = 29500
_DISCARD_PORT = 9  # a UDP connect sends nothing: it asks the kernel which way a packet would leave
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def split_endpoint(endpoint: str, key: str) -> tuple[str, int]:
    """Split ``host:port`` or ``[v6]:port``; the port may be left out.

    Raises:
        DriverError: There is no host, or the port is no port.
    """
    host, colon, port = endpoint.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):  # no port, or a bare IPv6 address
        host, port = endpoint, str(DEFAULT_PORT)
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DriverError(
            f"{key}={endpoint} was set; it is HOST:PORT with a port from 1 to 65535, for example node0:{DEFAULT_PORT}."
        )
    return host, int(port)


def address_towards(host: str) -> str | None:
    """The address of this machine from which it speaks to ``host``, or None where there is no way."""
    try:
        found = socket.getaddrinfo(host, _DISCARD_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, _, _, target in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    return None


def wrong_interface(host: str) -> str:
    """What is wrong with the network interface that the user has set for a run that meets at ``host``, or ""."""
    value = os.environ.get("GLOO_SOCKET_IFNAME", "")
    here = address_towards(host)
    if not value or here is None or here.startswith("127.") or here == "::1":
        return ""
    names = [name for _, name in socket.if_nameindex()]
    unknown = [name for name in value.split(",") if name not in names]
    if unknown:
        found = f"there is no interface {unknown[0]} there, but {', '.join(names)}"
    elif value == "lo":
        found = "the loopback leads to no other node"
    else:
        return ""
    right = interface_of(here)
    return (
        f"GLOO_SOCKET_IFNAME={value} was set on {socket.gethostname()}, but {found}. To mend it: unset it"
        f"{f' (then {right} is used, which leads to {host})' if right else ''}, or set one of these on each node."
    )


def is_this_machine(host: str) -> bool:
    """Whether ``host`` resolves to an address of this machine."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, _, _, target in found:
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            probe.bind(target)
            return True
    return False


def interface_of(address: str | None) -> str | None:
    """Name of the network interface that has an IPv4 address, or None."""
    if address is None or ":" in address or not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
