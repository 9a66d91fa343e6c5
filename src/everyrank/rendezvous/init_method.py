"""The store where the processes of a run meet: a TCP store, the launcher's own store, or a shared file."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from everyrank.errors import ConfigError, RendezvousError
from everyrank.launch_env.process_environment import ProcessEnvironment, environment_error
from everyrank.rendezvous.interfaces import is_this_host, why_unreachable

_LISTEN_BACKLOG = 4096
_PROBE_S = 2.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.1
_GRACE_S = 2.0  # torch keeps its own timeout where it can; ours is for where it cannot


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """An open store and how to speak about it.

    Attributes:
        store: The store; its keys may be older than this run.
        host: Address of the server if rank 0 runs it, so that rank 0 must leave last; None if something else does.
        endpoint: Address and port, or file, for messages.
    """

    store: dist.Store
    host: tuple[str, int] | None
    endpoint: str


class _NoAnswer(TimeoutError):
    """Nothing answers where the master should be."""


def open_meeting(
    environment: ProcessEnvironment, init_method: str, timeout_s: float, environ: Mapping[str, str]
) -> Meeting:
    """Open the store where all processes of the run meet.

    Args:
        environment: The process's place in the run.
        init_method: ``env://`` or ``tcp://`` (at the environment's master), or ``file:///PATH`` (shared by all nodes).
        timeout_s: Give up connecting after so many seconds.
        environ: Environment variables, to tell whether torch's elastic agent hosts the store.

    Raises:
        ConfigError: ``init_method`` cannot be understood.
        LaunchEnvironmentError: ``env://``, and nobody said where the master is.
        RendezvousError: The master cannot be reached in time, or its port is taken.
    """
    if environment.world_size == 1:
        return Meeting(store=dist.HashStore(), host=None, endpoint="this process")
    scheme, _, rest = init_method.partition("://")
    if scheme == "file":
        return _open_file(rest, environment, timeout_s)
    if scheme not in ("env", "tcp"):
        raise ConfigError(
            f"init_method={init_method!r} is not understood. To mend it: env://, tcp://HOST:PORT or file:///PATH."
        )
    if environment.master_addr is None or environment.master_port is None:
        missing = "MASTER_ADDR" if environment.master_addr is None else "MASTER_PORT"
        raise environment_error(
            f"the launch environment is half-set: {environment.world_size} processes (by {environment.detected_by}) "
            f"need a place to meet, and {missing} is missing",
            environ,
            "set MASTER_ADDR to rank 0's host and MASTER_PORT to a free port there, or use init_method=file:///PATH.",
        )
    agent_hosts = scheme == "env" and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _open_tcp(environment.master_addr, environment.master_port, environment, timeout_s, agent_hosts=agent_hosts)


def master_of_url(init_method: str) -> tuple[str | None, int | None]:
    """Return host and port of ``tcp://HOST:PORT``, or None and None for other ways to meet.

    Raises:
        ConfigError: The host or the port is missing.
    """
    if not init_method.startswith("tcp://"):
        return None, None
    url = urlsplit(init_method)
    try:
        port = url.port
    except ValueError:
        port = None
    if not url.hostname or not port:
        raise ConfigError(f"init_method={init_method!r} lacks a host or a port. To mend it: tcp://HOST:PORT.")
    return url.hostname, port


def _open_tcp(host: str, port: int, environment: ProcessEnvironment, timeout_s: float, *, agent_hosts: bool) -> Meeting:
    local = environment.num_nodes == 1
    endpoint = f"{host}:{port}"
    if local and not agent_hosts and is_this_host(host):
        host = "127.0.0.1"  # one address family for all: localhost may also resolve to ::1
    hosts = environment.rank == 0 and not agent_hosts
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=timeout_s),
        "wait_for_workers": False,
        "world_size": environment.world_size,
    }
    if hosts:
        listener = _listen(port, loopback=local)
        # The store owns the descriptor from here on and closes it with the server.
        store = dist.TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=listener.detach(), **options)
        return Meeting(store=store, host=(host, port), endpoint=endpoint)
    try:
        client = _connect(host, port, timeout_s, options)
    except (dist.DistError, RuntimeError, TimeoutError, ValueError) as error:
        reason = str(error) if isinstance(error, _NoAnswer) else "something answers, but it is no store of torch's"
        raise RendezvousError(
            f"rank {environment.rank} of {environment.world_size} (launcher {environment.launcher}) could not reach "
            f"the master at {endpoint} within {round(timeout_s, 1):g} s ({reason}). To mend it: check that rank 0 "
            f"runs, that MASTER_ADDR={environment.master_addr} and MASTER_PORT={environment.master_port} are right on "
            "every node and that no firewall is between them, or raise timeout_s if rank 0 starts late."
        ) from error
    return Meeting(store=client, host=None if agent_hosts else (host, port), endpoint=endpoint)


def _connect(host: str, port: int, timeout_s: float, options: dict[str, Any]) -> dist.Store:
    """Connect to the master's store.

    torch is asked when something answers at the address: until then it would wait in C++, and say why it gave up on
    the standard error, in pages. For a server that accepts and then says nothing it would wait for ever.

    Raises:
        _NoAnswer: Nothing answers in time; its text is the reason.
        Exception: Something answers, but not as a store.
    """
    deadline, pause_s = time.monotonic() + timeout_s, _SHORTEST_PAUSE_S
    while reason := why_unreachable(host, port, min(_PROBE_S, max(deadline - time.monotonic(), _SHORTEST_PAUSE_S))):
        if time.monotonic() + pause_s > deadline:
            raise _NoAnswer(reason)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    done: Future[dist.Store] = Future()

    def connect() -> None:
        try:
            done.set_result(dist.TCPStore(host, port, is_master=False, **options))
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=connect, name="everyrank-connect", daemon=True).start()
    return done.result(max(deadline - time.monotonic(), 0) + _GRACE_S)


def _listen(port: int, *, loopback: bool) -> socket.socket:
    """Return a listening socket for the store: on loopback only, or on all addresses of both families."""
    try:
        if loopback:
            return _bound(socket.AF_INET, ("127.0.0.1", port))
        if socket.has_dualstack_ipv6():
            return _bound(socket.AF_INET6, ("::", port))
        return _bound(socket.AF_INET, ("0.0.0.0", port))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        found = "is already in use on this machine" if error.errno == errno.EADDRINUSE else "needs privileges"
        raise RendezvousError(
            f"the master port {port} was asked for, but it {found} (perhaps by another run). "
            "To mend it: choose another master_port (MASTER_PORT), end the program that listens there "
            f"(ss -tlnp 'sport = :{port}' names it), or start by a driver that finds a free port itself."
        ) from error


def _bound(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(_LISTEN_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _open_file(path: str, environment: ProcessEnvironment, timeout_s: float) -> Meeting:
    file = Path(path)
    if not path or not file.parent.is_dir():
        raise ConfigError(
            f"init_method=file://{path} needs a folder that exists and that all nodes share; {file.parent} does not. "
            "To mend it: create it, or name another file, for example file:///shared/run1/rendezvous."
        )
    store = dist.FileStore(str(file), environment.world_size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return Meeting(store=store, host=None, endpoint=f"file {path}")
