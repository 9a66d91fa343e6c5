"""Whether a port that was asked for can be had; without torch, before anything is started."""

from __future__ import annotations

import socket

from everyrank.errors import DriverError


def busy_port(port: int) -> DriverError:
    """The error for a master port that was asked for and is taken."""
    return DriverError(
        f"driver.master_port={port} was set, but port {port} of this machine is in use by another process. "
        "Leave driver.master_port out (a free port is then chosen), or set another one."
    )


def check_port_is_free(port: int, host: str = "127.0.0.1") -> None:
    """Raise DriverError if ``port`` cannot be bound on ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise busy_port(port) from error
