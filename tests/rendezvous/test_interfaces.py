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


@pytest.mark.parametrize(
    ("value", "towards", "found"),
    [
        ("lo", None, ""),
        ("eth", "node0", ""),  # the beginning of a name
        ("=eth1,eth0", "node0", ""),
        ("^lo,docker", "node0", ""),
        ("=eth", "node0", "there is no interface eth there, but lo, eth0. Did you mean 'eth0'?"),
        ("ib", "node0", "there is no interface ib there, but lo, eth0."),
        ("ib0", "node0", "the interface ib0 has no address there; lo, eth0 have"),
        ("^lo,eth", "node0", "there is no interface besides lo, eth there, but lo, eth0."),
        ("lo", "node0", "the loopback leads to no other node"),
    ],
)
def test_what_is_set_for_nccl(monkeypatch: pytest.MonkeyPatch, value: str, towards: str | None, found: str) -> None:
    there = {"lo": ["127.0.0.1"], "eth0": ["192.0.2.7"], "ib0": []}
    monkeypatch.setattr(interfaces, "interfaces", lambda: there)
    monkeypatch.setattr(interfaces, "interface_towards", lambda host: "eth0")
    environ = {"NCCL_SOCKET_IFNAME": value}
    assert interfaces.wrong_interface(environ, towards) == "", "without nccl nobody reads it"
    problem = interfaces.wrong_interface(environ, towards, nccl=True)
    if not found:
        assert problem == ""
        return
    assert found in problem
    assert problem.startswith(f"NCCL_SOCKET_IFNAME={value} was set on ")
    assert "Fix: unset it (then " in problem
