"""Addresses and network interfaces of this machine, asked of the kernel; the standard library only.

Both the process that launches and its ranks need to know which way leads to the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

from everyrank.errors import did_you_mean

_PROBE_PORT = 9  # discard: a UDP connect sends nothing, it only asks the kernel for the route
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_SOMEWHERE_ELSE = "192.0.2.1"  # RFC 5737 documentation address: never local, so the default route answers for it


def loopback_interface() -> str:
    """Return the name of the loopback interface."""
    return "lo0" if sys.platform == "darwin" else "lo"


def addresses_of(host: str) -> list[str]:
    """Return the IP addresses ``host`` resolves to, in the resolver's order; empty if it does not resolve."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_local_address(address: str) -> bool:
    """Tell whether an IP address belongs to this machine."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def is_this_host(host: str) -> bool:
    """Tell whether ``host`` resolves to an address of this machine."""
    return any(is_local_address(address) for address in addresses_of(host))


def address_towards(host: str) -> str | None:
    """Return the address of this machine from which it speaks to ``host``, or None where there is no way."""
    sources = (_source_address(target) for target in addresses_of(host))
    return next((source for source in sources if source is not None), None)


def interface_towards(host: str) -> str | None:
    """Return the name of the network interface through which this machine reaches ``host``.

    On the host that owns the address this is the interface that carries it, not the loopback. Where the name resolves
    to the loopback (as Debian's 127.0.1.1), the interface of the default route is returned, since other nodes cannot
    come that way.

    Args:
        host: Host name or IP address, usually the run's master.

    Returns:
        The interface's name, or None if there is no route, or on systems whose interfaces cannot be asked (not Linux).
    """
    for target in addresses_of(host):
        source = _source_address(target)
        if source is not None and not is_loopback_address(source):
            return interface_with(source)
    source = _source_address(_SOMEWHERE_ELSE)
    return interface_with(source) if source else None


def interface_with(address: str) -> str | None:
    """Return the name of the interface that has ``address``, or None if none has, or not on Linux."""
    wanted = address.partition("%")[0]
    return next((name for name, addresses in interfaces().items() if wanted in addresses), None)


def is_loopback_address(address: str) -> bool:
    """Tell whether an IP address is the loopback's."""
    return address.startswith("127.") or address == "::1"


def wrong_interface(environ: Mapping[str, str], towards: str | None, *, nccl: bool = False) -> str:
    """Say what is wrong with the interfaces that the user has set for gloo, and for nccl where that is used.

    Args:
        environ: Environment variables.
        towards: Host of rank 0 on another machine; None where all ranks are on this one.
        nccl: Whether nccl is used; gloo always is.

    Returns:
        What was set, what was found and how to mend it; empty if nothing is wrong, or not on Linux.
    """
    there = interfaces()
    usable = [name for name, addresses in there.items() if addresses]
    readers = {"GLOO_SOCKET_IFNAME": _named_for_gloo, **({"NCCL_SOCKET_IFNAME": _named_for_nccl} if nccl else {})}
    for variable, read in readers.items():
        value = environ.get(variable, "")
        if not value or not there:
            continue
        chosen, useless = read(value, usable)
        hint, cure = "", "set one of these"
        if useless in there:
            found = f"the interface {useless} has no address there; {', '.join(usable)} have"
        elif useless is not None:
            found = f"there is no interface {useless} there, but {', '.join(usable)}"
            hint = did_you_mean(useless, usable)
        elif towards is not None and chosen == [loopback_interface()]:
            found, cure = "the loopback leads to no other node", "set one that leads to the others"
        else:
            continue
        right = loopback_interface() if towards is None else interface_towards(towards)
        why = "as all ranks are on this machine" if towards is None else f"which leads to {towards}"
        return (
            f"{variable}={value} was set on {socket.gethostname()}, but {found}.{hint} Fix: unset it"
            f"{f' (then {right} is used, {why})' if right else ''}, or {cure}."
        )
    return ""


def _named_for_gloo(value: str, usable: list[str]) -> tuple[list[str], str | None]:
    """Return the interfaces that a value names, and the first name in it that is of no use."""
    names = value.split(",")
    return names, next((name for name in names if name not in usable), None)


def _named_for_nccl(value: str, usable: list[str]) -> tuple[list[str], str | None]:
    """As for gloo, but names are beginnings of names, or whole ones after ``=``, or those to leave out after ``^``."""
    excludes = value.startswith("^")
    exact = value.removeprefix("^").startswith("=")
    names = value.removeprefix("^").removeprefix("=").split(",")
    fit = [one for one in usable if any(one == name if exact else one.startswith(name) for name in names)]
    chosen = [one for one in usable if one not in fit] if excludes else fit
    return chosen, None if chosen else (f"besides {', '.join(names)}" if excludes else names[0])


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


def why_unreachable(host: str, port: int, patience_s: float = 2.0) -> str:
    """Return why nothing answers at ``host:port`` within ``patience_s``, or an empty string if something does."""
    try:
        socket.create_connection((host, port), timeout=patience_s).close()
    except socket.gaierror:
        return f"the name {host} does not resolve here"
    except TimeoutError:
        return "no answer: the host is down, or a firewall drops the packets"
    except ConnectionRefusedError:
        return "connection refused: the host is up, but nothing listens on that port"
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _source_address(target: str) -> str | None:
    """Return the local address from which this machine would speak to ``target``."""
    try:
        with socket.socket(_family(target), socket.SOCK_DGRAM) as probe:
            probe.connect((target, _PROBE_PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interfaces() -> dict[str, list[str]]:
    """The interfaces of this machine and their addresses, IPv4 first; empty where they cannot be asked (not Linux)."""
    if not sys.platform.startswith("linux"):
        return {}
    import fcntl

    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name, addresses in found.items():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, *_, name = line.split()
        found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found
