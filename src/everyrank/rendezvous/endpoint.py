"""Where nodes meet, as people write it: ``HOST:PORT``."""

from __future__ import annotations

from everyrank.errors import DriverError

DEFAULT_PORT = 29500


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
