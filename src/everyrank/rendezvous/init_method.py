"""The store where the processes of a run meet: a TCP store, the launcher's own store, or a shared file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from everyrank.errors import ConfigError, RendezvousError
from everyrank.launch_env.process_environment import ProcessEnvironment, environment_error
from everyrank.rendezvous.interfaces import is_this_host
from everyrank.rendezvous.ports import LOOPBACK, listen
from everyrank.rendezvous.stores import NoAnswerError, open_client


@dataclass(frozen=True, kw_only=True)
class RendezvousStore:
    """An open store and how to speak about it.

    Attributes:
        store: The store; its keys may be older than this run.
        host: Address of the server if rank 0 runs it, so that rank 0 must leave last; None if something else does.
        endpoint: Address and port, or file, for messages.
    """

    store: dist.Store
    host: tuple[str, int] | None
    endpoint: str


def open_store(
    environment: ProcessEnvironment, init_method: str, timeout_s: float, environ: Mapping[str, str]
) -> RendezvousStore:
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
        return RendezvousStore(store=dist.HashStore(), host=None, endpoint="this process")
    scheme, _, rest = init_method.partition("://")
    if scheme == "file":
        return _open_file(rest, environment, timeout_s)
    if scheme not in ("env", "tcp"):
        raise ConfigError(
            f"init_method={init_method!r} is not understood. Fix: env://, tcp://HOST:PORT or file:///PATH."
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
        raise ConfigError(f"init_method={init_method!r} lacks a host or a port. Fix: tcp://HOST:PORT.")
    return url.hostname, port


def _open_tcp(
    host: str, port: int, environment: ProcessEnvironment, timeout_s: float, *, agent_hosts: bool
) -> RendezvousStore:
    local = environment.num_nodes == 1
    endpoint = f"{host}:{port}"
    if local and not agent_hosts and is_this_host(host):
        host = LOOPBACK  # one address family for all: localhost may also resolve to ::1
    hosts = environment.rank == 0 and not agent_hosts
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=timeout_s),
        "wait_for_workers": False,
        "world_size": environment.world_size,
    }
    if hosts:
        listener = listen(port, "MASTER_PORT", loopback=local)
        # The store owns the descriptor from here on and closes it with the server.
        store = dist.TCPStore(LOOPBACK, port, is_master=True, master_listen_fd=listener.detach(), **options)
        return RendezvousStore(store=store, host=(host, port), endpoint=endpoint)
    try:
        client = open_client(host, port, timeout_s, **options)
    except (dist.DistError, RuntimeError, TimeoutError, ValueError) as error:
        reason = str(error) if isinstance(error, NoAnswerError) else "something answers, but it is no store of torch's"
        raise RendezvousError(
            f"rank {environment.rank} of {environment.world_size} (launcher {environment.launcher}) could not reach "
            f"the master at {endpoint} within {round(timeout_s, 1):g} s ({reason}). Fix: check that rank 0 "
            f"runs, that MASTER_ADDR={environment.master_addr} and MASTER_PORT={environment.master_port} are right on "
            "every node and that no firewall is between them, or raise timeout_s if rank 0 starts late."
        ) from error
    return RendezvousStore(store=client, host=None if agent_hosts else (host, port), endpoint=endpoint)


def _open_file(path: str, environment: ProcessEnvironment, timeout_s: float) -> RendezvousStore:
    file = Path(path)
    if not path or not file.parent.is_dir():
        raise ConfigError(
            f"init_method=file://{path} needs a folder that exists and that all nodes share; {file.parent} does not. "
            "Fix: create it, or name another file, for example file:///shared/run1/rendezvous."
        )
    store = dist.FileStore(str(file), environment.world_size)
    store.set_timeout(timedelta(seconds=timeout_s))
    return RendezvousStore(store=store, host=None, endpoint=f"file {path}")
