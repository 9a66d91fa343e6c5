"""Joining and leaving the run's process group."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from everyrank.errors import ConfigError, ProcessGroupError
from everyrank.launch_env.detection import (
    DEFAULT_MASTER_ADDR,
    DEFAULT_MASTER_PORT,
    detect_with_arguments,
    is_loopback_name,
)
from everyrank.launch_env.process_environment import ProcessEnvironment
from everyrank.rendezvous.handshake import Handshake, shake_hands
from everyrank.rendezvous.init_method import master_of_url
from everyrank.rendezvous.interfaces import choose_interfaces
from everyrank.rendezvous.paths import check_paths
from everyrank.runtime import torch_cures
from everyrank.runtime.device import bind_device, choose_backend, device_identity
from everyrank.runtime.membership import Membership, get_membership, set_membership
from everyrank.runtime.mistakes import told_plainly
from everyrank.runtime.world import World

_log = logging.getLogger("everyrank.runtime")
_FAREWELL_S = 5.0  # how long the rank that hosts the store waits for the others to leave
_PROBE_S = 1.0
_MAX_TIMEOUT_S = 1e9
_DESTROY_S = 2.0  # how long a rank that leaves on an exception waits for the group's threads


@contextmanager
def join(
    *,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | str | None = None,
    init_method: str = "env://",
    backend: str | None = "auto",
    timeout_s: float = 600.0,
    device: str = "auto",
) -> Iterator[World]:
    """Join the run's process group, and leave it at the end of the block, also on an exception.

    Without arguments everything comes from the launcher's variables (see :func:`everyrank.detect`); in plain Python
    the world has size 1. Arguments win over variables. The group also exists at world size 1, so that a program that
    wraps its model in ``DistributedDataParallel`` runs unchanged.

    Args:
        rank: This process's rank; with ``world_size``, for processes that the program started itself.
        world_size: Number of processes.
        local_rank: This process's index on its node; by default as the launcher says, or ``rank`` on one machine.
        master_addr: Host of rank 0; by default MASTER_ADDR, or localhost with explicit ``rank`` and ``world_size``.
        master_port: Port on that host; by default MASTER_PORT, or 12355 with explicit ``rank`` and ``world_size``.
        init_method: ``env://``, ``tcp://HOST:PORT`` or ``file:///PATH`` (a file all nodes share; one that an earlier
            run left is no hindrance).
        backend: ``auto`` (nccl on CUDA, gloo elsewhere), ``gloo``, ``nccl`` or ``mpi``.
        timeout_s: For joining and for each collective, in seconds.
        device: ``auto``, ``cpu``, ``cuda``, or one device such as ``cuda:1``.

    Yields:
        This process's world.

    Raises:
        LaunchEnvironmentError: The launcher's variables are half-set or contradict each other.
        ConfigError: The device or backend does not exist here.
        RendezvousError: The master is unreachable, its port is taken, ranks are missing at the timeout or do not fit
            together or cannot reach each other, or GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names an interface that
            cannot carry the run.
        ProcessGroupError: This process is in a group already.

    Of these the first three are a person's mistakes: a script that does not catch them ends with the message alone,
    without a traceback, and exit code 2.
    """
    with told_plainly():
        url_addr, url_port = master_of_url(init_method)
        environment = detect_with_arguments(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            master_addr=url_addr or master_addr,
            master_port=url_port or master_port,
        )
        world = _enter(environment, init_method, backend, timeout_s, device)
    try:
        yield world
    except BaseException:
        _leave(failed=True)
        raise
    _leave(failed=False)


def initialize_ddp(
    rank: int,
    world_size: int,
    master_addr: str = "localhost",
    master_port: int | str = "12355",
    backend: str | None = None,
    timeout_s: float = 600.0,
) -> World:
    """Join a process group as ``rank`` of ``world_size``; :func:`cleanup_ddp` leaves it.

    On one machine nothing else is needed. Where MASTER_ADDR and MASTER_PORT are set (torchrun) and both arguments
    were left at their defaults, the variables win, so that the launcher's rendezvous is used.

    Args:
        rank: This process's rank.
        world_size: Number of processes.
        master_addr: Host of rank 0.
        master_port: Port on that host.
        backend: ``gloo``, ``nccl``, ``mpi``, or None for nccl on CUDA and gloo elsewhere.
        timeout_s: For joining and for each collective, in seconds.

    Returns:
        This process's world.

    Raises:
        UserError: As :func:`join`.
        ProcessGroupError: As :func:`join`.
    """
    left_default = master_addr == DEFAULT_MASTER_ADDR and str(master_port) == str(DEFAULT_MASTER_PORT)
    with told_plainly():
        environment = detect_with_arguments(
            rank=rank,
            world_size=world_size,
            master_addr=None if left_default else master_addr,
            master_port=None if left_default else master_port,
        )
        return _enter(environment, "env://", backend, timeout_s, "auto")


def cleanup_ddp() -> None:
    """Leave the process group, if this process is in one."""
    _leave(failed=sys.exc_info()[0] is not None)


def current_world() -> World:
    """Return the world this process has joined.

    A group that was made by ``torch.distributed.init_process_group`` is seen too. Where there is none, the world has
    size 1 and the default device, whatever the launcher's variables say.
    """
    membership = get_membership()
    if membership is not None:
        return membership.world
    if dist.is_available() and dist.is_initialized():
        found = detect_with_arguments(rank=dist.get_rank(), world_size=dist.get_world_size())
        return World(**vars(found), device=_default_device(found.local_rank), backend=dist.get_backend())
    return World(device=_default_device(0), backend="none")


def _default_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank if local_rank < torch.cuda.device_count() else 0)


def _enter(
    environment: ProcessEnvironment, init_method: str, backend: str | None, timeout_s: float, device: str
) -> World:
    if not dist.is_available():
        raise ConfigError("this torch was built without torch.distributed. Fix: install another build of torch.")
    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise ConfigError(f"timeout_s={timeout_s!r} is no number of seconds between 0 and 1e9. Fix: use e.g. 600.")
    if dist.is_initialized():
        raise ProcessGroupError(
            f"this process is already in a process group, as rank {dist.get_rank()} of {dist.get_world_size()}. "
            "Fix: join once, around the whole program, or leave first (cleanup_ddp)."
        )
    torch_cures.install()
    bound = bind_device(environment, device)
    chosen = choose_backend(backend, bound)
    gpu = device_identity(bound) if chosen == "nccl" else ""
    handshake = shake_hands(environment, init_method, timeout_s, os.environ, gpu)
    saved = _set_interfaces(handshake, environment, chosen)
    try:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        check_paths(handshake.store, environment.rank, handshake.places, handshake.delegates, interface)
        _make_group(environment, chosen, bound, handshake.store, timeout_s)
    except BaseException:
        _restore(saved)
        raise
    world = World(**vars(environment), device=bound, backend=chosen)
    set_membership(Membership(world=world, handshake=handshake, timeout_s=timeout_s, saved_variables=saved))
    _log.info(
        "joined as rank %d of %d at %s (launcher %s by %s, backend %s, device %s)",
        *(
            world.rank,
            world.world_size,
            handshake.rendezvous.endpoint,
            environment.launcher,
            environment.detected_by,
            chosen,
            bound,
        ),
    )
    return world


def _make_group(
    environment: ProcessEnvironment, backend: str, device: torch.device, store: dist.Store, timeout_s: float
) -> None:
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if backend == "mpi":  # MPI has its own wiring and its own ranks
        dist.init_process_group("mpi", **options)
        if dist.get_rank() != environment.rank:
            found = dist.get_rank()
            dist.destroy_process_group()
            raise ProcessGroupError(f"MPI says rank {found}, the launcher's variables say rank {environment.rank}.")
        return
    if backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"  # decisions and names travel as CPU tensors, without a host-device sync
        if environment.world_size > 1:
            options["device_id"] = device
    dist.init_process_group(backend, store=store, rank=environment.rank, world_size=environment.world_size, **options)


def _set_interfaces(handshake: Handshake, environment: ProcessEnvironment, backend: str) -> dict[str, str | None]:
    """Tell the backends their network interfaces, as long as the group lives; return the variables' earlier values."""
    towards = environment.master_addr
    if towards is None or is_loopback_name(towards):  # a shared file, or a master that calls itself localhost
        towards = handshake.main_host
    chosen, said = choose_interfaces(
        os.environ, on_one_machine=handshake.on_one_machine, towards=towards, backend=backend
    )
    saved = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    _log.info("network interface: %s", said)
    return saved


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _leave(*, failed: bool) -> None:
    membership = get_membership()
    if membership is None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        return
    set_membership(None)
    try:
        if failed:
            _destroy_without_waiting()
        else:
            if dist.is_initialized():
                dist.destroy_process_group()
            _say_goodbye(membership)
    finally:
        _restore(membership.saved_variables)


def _destroy_without_waiting() -> None:
    """Destroy the group, but do not wait for collectives that the other ranks will never finish with this one."""
    if not dist.is_initialized():
        return
    thread = threading.Thread(target=_abort_and_destroy, name="everyrank-leave", daemon=True)
    thread.start()
    thread.join(_DESTROY_S)
    if thread.is_alive():
        _log.warning("left a collective unfinished: the process group did not end within %g s", _DESTROY_S)


def _abort_and_destroy() -> None:
    try:
        dist.distributed_c10d._abort_process_group()
    except Exception as error:
        _log.debug("abort: %s", error)
    if dist.is_initialized():
        dist.destroy_process_group()


def _say_goodbye(membership: Membership) -> None:
    """Count this rank out; the rank that hosts the store stays until all are out, for they may still read it.

    Not for long: a rank that fails, or that goes on alone for a while, does not need the store any more.
    """
    handshake, is_host = membership.handshake, membership.world.rank == 0
    host, store = handshake.rendezvous.host, handshake.store
    try:
        if host is None:
            store.set(f"left/{membership.world.rank}", "1")
            return
        if not is_host:
            # A host that is gone needs no message, and asking first avoids torch's stack trace about it.
            socket.create_connection(host, timeout=_PROBE_S).close()
        store.set(f"left/{membership.world.rank}", "1")  # what monitored_barrier looks at
        if store.add("left", 1) == membership.world.world_size:
            store.set("all_left", "1")
        elif is_host:
            store.wait(["all_left"], timedelta(seconds=min(membership.timeout_s, _FAREWELL_S)))
    except (dist.DistError, OSError, RuntimeError) as error:
        _log.debug("some ranks did not say that they leave: %s", str(error).splitlines()[0])
