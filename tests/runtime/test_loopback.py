"""On one machine nothing listens beyond loopback: the kernel's socket table says so, beside plain torch, which does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from everyrank.runtime.collectives import reduce_sum
from everyrank.runtime.process_group import join

Run = Callable[..., list[Any]]
_LISTEN = "0A"  # TCP_LISTEN of the kernel's include/net/tcp_states.h


def _listening_addresses() -> set[str]:
    """Addresses on which this process listens, from the kernel's table of its own sockets."""
    inodes = set()
    for fd in Path("/proc/self/fd").iterdir():
        target = os.readlink(fd) if fd.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


_LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def _ours(rank: int, port: int) -> tuple[set[str], int, bool]:
    with join(rank=rank, world_size=2, master_port=port, timeout_s=30):
        total = int(reduce_sum(torch.tensor(rank)))
        dist.new_group(backend="gloo")  # a group made later stays on loopback too
        seen = _listening_addresses()
    return seen, total, "GLOO_SOCKET_IFNAME" in os.environ


def _torch(rank: int, port: int) -> set[str]:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    seen = _listening_addresses()
    dist.barrier()
    dist.destroy_process_group()
    return seen


def test_no_socket_listens_beyond_loopback(run_ranks: Run, free_port: int) -> None:
    for end in run_ranks(_ours, 2, free_port):
        assert end.error is None, end
        seen, total, left_set = end.value
        assert seen, "the table shows no listening socket, so the test shows nothing"
        assert seen <= _LOOPBACK
        assert (total, left_set) == (1, False)


def test_plain_torch_does_listen_beyond_loopback(run_ranks: Run, free_port: int) -> None:
    ends = run_ranks(_torch, 2, free_port)
    assert [end.error for end in ends] == [None, None]
    assert set.union(*(end.value for end in ends)) - _LOOPBACK


def _own_interface(rank: int, port: int) -> str:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with join(rank=rank, world_size=2, master_port=port, timeout_s=30):
        pass
    return os.environ["GLOO_SOCKET_IFNAME"]


def test_the_users_interface_stays(run_ranks: Run, free_port: int) -> None:
    assert [end.value for end in run_ranks(_own_interface, 2, free_port)] == ["lo", "lo"]
