"""The port where the processes of a run meet: as people write it, and listening on it. Without torch."""

from __future__ import annotations

import errno
import socket

from everyrank.errors import DriverError, RendezvousError

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500

_BACKLOG = 4096


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


def listen(port: int, setting: str, *, loopback: bool) -> socket.socket:
    """Return a socket that listens: on loopback only, or on all addresses of both families.

    Args:
        port: The port that was asked for, or 0 for any free one.
        setting: What asked for it, for the message.
        loopback: No other machine takes part.

    Raises:
        RendezvousError: The port is taken, or needs privileges.
    """
    try:
        if loopback:
            return _listening(socket.AF_INET, (LOOPBACK, port))
        if socket.has_dualstack_ipv6():
            return _listening(socket.AF_INET6, ("::", port))
        return _listening(socket.AF_INET, ("0.0.0.0", port))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        found = "is in use by another process" if error.errno == errno.EADDRINUSE else "needs privileges"
        cure = "set another one" + ("" if loopback else ", the same on every node")
        if loopback and setting.startswith("driver."):
            cure = f"leave {setting} out (a free port is then chosen), {cure}"
        raise RendezvousError(
            f"{setting}={port} was set, but port {port} of this machine {found}. Fix: "
            f"{cure}, or end the program that has it (ss -tlnp 'sport = :{port}' names it)."
        ) from error


def check_port_is_free(port: int) -> None:
    """Raise RendezvousError if ``driver.master_port`` cannot be had on loopback."""
    listen(port, "driver.master_port", loopback=True).close()


def _listening(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
