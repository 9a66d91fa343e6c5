"""Which interface leads where, on this machine."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from everyrank.rendezvous import interfaces


def test_addresses_of_this_machine() -> None:
    assert interfaces.is_this_host("localhost")
    assert interfaces.is_this_host("127.0.0.1")
    assert not interfaces.is_this_host("192.0.2.1")  # RFC 5737: nobody's
    assert interfaces.addresses_of("no-such-host.invalid") == []
    assert not interfaces.is_this_host("no-such-host.invalid")
    assert interfaces.loopback_interface() in {name for _, name in socket.if_nameindex()}


def test_the_interface_towards_an_address() -> None:
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    default = [fields[0] for fields in routes if fields[1] == "00000000"]
    found = interfaces.interface_towards("192.0.2.1")
    assert found == (default[0] if default else None)
    # Where the master's name resolves to loopback, other nodes cannot come that way: the default route decides.
    assert interfaces.interface_towards("localhost") == found
    if not default:
        pytest.skip("no default route here: the rest needs an address beyond loopback")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    assert interfaces.interface_towards(own) == default[0]  # not lo, though the kernel routes it there
