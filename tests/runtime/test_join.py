"""Joining and leaving, with real processes: what comes back, and what is said when it cannot work."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import everyrank
from conftest import nightly
from everyrank.errors import ConfigError, ProcessGroupError, RendezvousError
from everyrank.runtime.process_group import cleanup_ddp, current_world, initialize_ddp, join

Run = Callable[..., list[Any]]


def _sum_of_ranks() -> int:
    return int(everyrank.reduce_sum(torch.tensor(dist.get_rank())))


def test_plain_python_is_a_world_of_one_with_a_group() -> None:
    before = {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "RANK")}
    with join(device="cpu") as world:
        assert (world.rank, world.world_size, world.local_rank, world.is_main, world.is_distributed) == (
            0,
            1,
            0,
            True,
            False,
        )
        assert (world.device, world.backend) == (torch.device("cpu"), "gloo")
        assert current_world() is world
        with pytest.raises(ProcessGroupError, match="already in a process group, as rank 0 of 1"), join():
            pass
        assert dist.is_initialized()
    assert not dist.is_initialized()
    assert {name: os.environ.get(name) for name in before} == before
    assert (current_world().world_size, current_world().backend) == (1, "none")


def _train_alone(rank: int, folder: str) -> float:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # DistributedDataParallel's imports make it
    with join(device="cpu"):
        model = DistributedDataParallel(torch.nn.Linear(2, 1))
        model(torch.ones(1, 2)).sum().backward()
        assert model.module.weight.grad is not None
        return float(model.module.weight.grad.sum())


def test_a_program_for_many_ranks_runs_unchanged_in_plain_python(run_ranks: Run, tmp_path: Path) -> None:
    assert run_ranks(_train_alone, 1, str(tmp_path))[0].value == 2.0


def test_leaves_on_exceptions() -> None:
    with pytest.raises(KeyError, match="mine"), join():
        raise KeyError("mine")
    assert not dist.is_initialized()
    cleanup_ddp()  # nothing to leave: no error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"backend": "glou"}, ("backend='glou'", "Did you mean 'gloo'?")),
        ({"backend": "mpi"}, ("backend='mpi'", "built without mpi", "Fix: ")),
        ({"device": "cuda"}, ("device='cuda'", "sees no CUDA GPU", "Fix: ")),
        ({"device": "gpu0"}, ("device='gpu0'", "Fix: ")),
        ({"timeout_s": 0}, ("timeout_s=0", "Fix: ")),
        ({"init_method": "http://x:1", "rank": 0, "world_size": 2}, ("init_method='http://x:1'", "tcp://HOST:PORT")),
        ({"init_method": "tcp://x", "rank": 0, "world_size": 2}, ("lacks a host or a port",)),
        ({"init_method": "file:///no/such/folder/f", "rank": 0, "world_size": 2}, ("/no/such/folder does not",)),
    ],
)
def test_refuses(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    if arguments.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError) as caught, join(**arguments):
        pass
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not dist.is_initialized()


def _three_ways(rank: int, size: int, port: int, folder: str) -> list[Any]:
    before, seen = dict(os.environ), []
    world = initialize_ddp(rank, size, master_port=port, timeout_s=30)
    try:
        seen.append(
            (world.rank, world.world_size, world.local_rank, world.local_world_size, world.num_nodes, _sum_of_ranks())
        )
    finally:
        cleanup_ddp()
    with join(rank=rank, world_size=size, init_method=f"tcp://localhost:{port}", timeout_s=30):
        seen.append(_sum_of_ranks())  # the same port again, at once
    file = Path(folder, f"meet-{size}")
    with join(rank=rank, world_size=size, init_method=f"file://{file}", timeout_s=30):
        seen.append(_sum_of_ranks())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    initialize_ddp(rank, size, timeout_s=30)  # the launcher's port, not the default
    seen.append(_sum_of_ranks())
    cleanup_ddp()
    changed = {name for name in os.environ if os.environ.get(name) != before.get(name)}
    return [*seen, sorted(changed)]


@pytest.mark.parametrize("size", [nightly(2), 3])
def test_joins_by_port_url_file_and_variables(size: int, run_ranks: Run, free_port: int, tmp_path: Path) -> None:
    ranks = run_ranks(_three_ways, size, size, free_port, str(tmp_path))
    total = size * (size - 1) // 2
    for rank, end in enumerate(ranks):
        assert end.error is None, end
        variables = ["MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"]  # those the test set: nothing of ours is left
        assert end.value == [(rank, size, rank, size, 1, total), total, total, total, variables]


def _meet_by_file(rank: int, size: int, file: str, dies: bool) -> int:
    with join(rank=rank, world_size=size, init_method=f"file://{file}", timeout_s=20):
        total = _sum_of_ranks()
        if dies:
            os._exit(9)
        return total


def test_a_file_left_by_a_crash_is_no_hindrance(run_ranks: Run, tmp_path: Path) -> None:
    file = tmp_path / "meet"
    assert [end.exit_code for end in run_ranks(_meet_by_file, 2, 2, str(file), True)] == [9, 9]
    assert file.exists()
    again = run_ranks(_meet_by_file, 2, 2, str(file), False)
    assert [(end.error, end.value) for end in again] == [(None, 1)] * 2


def _busy(rank: int, port: int) -> None:
    with join(rank=rank, world_size=2, master_port=port, timeout_s=20):
        pass


def test_a_busy_port_is_named_with_the_cure(run_ranks: Run) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (end,) = run_ranks(_busy, [0], port)
    assert end.error == "RendezvousError"
    assert issubclass(RendezvousError, everyrank.UserError)
    for part in (f"MASTER_PORT={port} was set", "in use by another process", "Fix: set another one"):
        assert part in end.message


def _unreachable(rank: int, addr: str, port: int) -> None:
    with join(rank=rank, world_size=2, master_addr=addr, master_port=port, timeout_s=2):
        pass


def test_an_unreachable_master_is_named_at_the_timeout(run_ranks: Run, free_port: int) -> None:
    (end,) = run_ranks(_unreachable, [1], "127.0.0.1", free_port)
    assert end.error == "RendezvousError"
    assert f"could not reach the master at 127.0.0.1:{free_port} within 2 s (connection refused" in end.message
    assert end.seconds < 10


def test_a_master_that_answers_nothing_is_named_too(run_ranks: Run) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        port = deaf.getsockname()[1]
        (end,) = run_ranks(_unreachable, [1], "127.0.0.1", port, timeout_s=30)
    assert end.error == "RendezvousError"
    assert f"could not reach the master at 127.0.0.1:{port} within 2 s (something answers, but" in end.message


def test_a_name_that_does_not_resolve_is_named(run_ranks: Run) -> None:
    (end,) = run_ranks(_unreachable, [1], "no-such-host.invalid", 29500, timeout_s=30)
    assert end.error == "RendezvousError"
    assert "no-such-host.invalid:29500 within 2 s (the name no-such-host.invalid does not resolve" in end.message


def _some_of_three(rank: int, port: int, world_sizes: dict[int, int]) -> None:
    with join(rank=rank, world_size=world_sizes.get(rank, 3), master_port=port, timeout_s=2):
        pass


def test_a_rank_that_does_not_come_is_named_on_all_that_came(run_ranks: Run, free_port: int) -> None:
    ends = run_ranks(_some_of_three, [0, 2], free_port, {})
    for end in ends:
        assert end.error == "RendezvousError"
        assert "rank 1 of 3 did not come" in end.message


def test_worlds_of_different_size_do_not_join(run_ranks: Run, free_port: int) -> None:
    ends = run_ranks(_some_of_three, 3, free_port, {1: 4})
    for end in ends:
        assert end.error == "RendezvousError"
        assert "has world size 3" in end.message
        assert "rank 1" in end.message
        assert "has 4" in end.message


def _half_set(rank: int, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    with join():
        pass


def test_no_master_is_a_half_set_environment(run_ranks: Run) -> None:
    (end,) = run_ranks(_half_set, [0], {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"})
    assert end.error == "LaunchEnvironmentError"
    assert "MASTER_PORT is missing" in end.message
    assert "RANK=0, WORLD_SIZE=2, MASTER_ADDR=localhost" in end.message


def _fail_alone(rank: int, port: int, pending: bool) -> None:
    with join(rank=rank, world_size=2, master_port=port, timeout_s=60):
        if rank == 0:
            if pending:
                dist.all_reduce(torch.ones(1), async_op=True)  # rank 1 never joins in
            raise ValueError("mine alone")
        if pending:
            while _answers(port):  # until rank 0 has left
                time.sleep(0.05)
        dist.barrier()


def _answers(port: int) -> bool:
    """Whether the store that rank 0 hosts still answers."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("pending", [False, True])
def test_a_rank_that_fails_leaves_and_frees_the_others(pending: bool, run_ranks: Run, free_port: int) -> None:
    """Well before the group's timeout of 60 s, also with a collective under way that rank 1 never joins."""
    failed, other = run_ranks(_fail_alone, 2, free_port, pending, timeout_s=30)
    assert (failed.error, failed.message) == ("ValueError", "mine alone")
    assert other.error == "RuntimeError"


def _rejoin(rank: int, ports: list[int]) -> list[int]:
    sums = []
    for port in ports:
        with join(rank=rank, world_size=2, master_port=port, timeout_s=30):
            sums.append(_sum_of_ranks())
    return sums


def test_leaving_and_joining_again_on_one_port_never_conflicts(run_ranks: Run, free_port: int) -> None:
    for end in run_ranks(_rejoin, 2, [free_port] * 10):
        assert (end.error, end.value) == (None, [1] * 10), end
