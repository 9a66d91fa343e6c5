"""Collectives on three real ranks, on one, and the barrier that names who did not come."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from everyrank.errors import BarrierTimeoutError, CheckpointError, DataError, EveryrankError, ProcessGroupError
from everyrank.runtime.agreement import agree, gather_agreed
from everyrank.runtime.collectives import (
    barrier,
    broadcast_decision,
    gather_objects,
    main_first,
    monitored_barrier,
    rank_zero_only,
    reduce_mean,
    reduce_sum,
)
from everyrank.runtime.process_group import current_world, join

Run = Callable[..., list[Any]]
DECISIONS = [
    None,
    True,
    False,
    0,
    -(2**63),
    2**63 - 1,
    2**80,
    -0.0,
    1e-320,
    math.inf,
    "",
    "stop",
    "ö" * 31,
    "ö" * 32,
    ("pair", 3),
    {"step": 12, "names": list(range(1000))},
    torch.float64,
]


@rank_zero_only
def _only_main(value: int) -> int:
    """Doc."""
    return value * 2


def _check_everything(rank: int, port: int) -> dict[str, Any]:
    with join(rank=rank, world_size=3, master_port=port, timeout_s=60):
        mine = torch.tensor([float(rank), 1.0], dtype=torch.float64, requires_grad=True)
        total = reduce_sum(mine)
        seen: dict[str, Any] = {
            "sum": (total.tolist(), total.dtype is torch.float64, total.requires_grad, mine.tolist()),
            "mean": reduce_mean(mine).tolist(),
            "mean of integers": reduce_mean(torch.tensor(rank)).item(),
            "gathered": gather_objects({"rank": rank, "payload": "x" * 10 ** (rank + 2)}),
            "main only": _only_main(21),
        }
        decided = [broadcast_decision(d if rank == 0 else "other") for d in DECISIONS]
        seen["decided"] = [(type(d).__name__, repr(d)) for d in decided]
        seen["decided by 2"] = broadcast_decision(rank, src=2)
        barrier()
        order: list[float] = []
        with main_first() as main:
            order.append(time.monotonic())
        seen["order"] = (main, order[0])
        try:
            with main_first():
                if rank == 0:
                    raise KeyError("disk full")
                seen["ran after the failure"] = True
        except (KeyError, ProcessGroupError) as error:
            seen["failure"] = (type(error).__name__, str(error))
        for _ in range(5):
            monitored_barrier(30)
        seen["agreed"] = (agree(lambda: rank), agree(lambda: 10 + rank, on=1), gather_agreed(lambda: rank * rank))
        seen["disagreed"] = []
        for kind, only, guilty in (
            (DataError, None, {1}),
            (DataError, None, {1, 2}),
            (KeyError, None, {1}),
            (BarrierTimeoutError, 1, {1}),
            (_Odd, 2, {2}),
            (CheckpointError, 0, {0}),
        ):
            try:
                agree(functools.partial(_fail_on, guilty, kind), on=only)
            except Exception as error:
                seen["disagreed"].append((type(error).__name__, str(error)))
        return seen


class _Odd(EveryrankError):
    """An error of a user's own, which the other ranks do not know."""


def _fail_on(guilty: set[int], kind: type[Exception]) -> None:
    if current_world().rank in guilty:
        raise kind("no space")


def test_three_ranks(run_ranks: Run, free_port: int) -> None:
    ranks = run_ranks(_check_everything, 3, free_port)
    assert [end.error for end in ranks] == [None] * 3, ranks
    expected = [(type(d).__name__, repr(d)) for d in DECISIONS]
    started = [end.value["order"][1] for end in ranks]
    assert started[0] <= min(started[1:])
    for rank, end in enumerate(ranks):
        seen = end.value
        assert seen["sum"] == ([3.0, 3.0], True, False, [float(rank), 1.0])
        assert seen["mean"] == [1.0, 1.0]
        assert seen["mean of integers"] == 1.0
        assert [(g["rank"], len(g["payload"])) for g in seen["gathered"]] == [(0, 100), (1, 1000), (2, 10000)]
        assert seen["main only"] == (42 if rank == 0 else None)
        assert seen["decided"] == expected
        assert seen["decided by 2"] == 2
        assert seen["order"][0] is (rank == 0)
        assert "ran after the failure" not in seen
        assert seen["agreed"] == (rank, 11, [0, 1, 4])
        assert seen["disagreed"] == [
            ("DataError", "rank 1: no space"),
            ("DataError", "rank 1: no space"),
            ("KeyError", "'no space'") if rank == 1 else ("RankFailedError", "rank 1 failed: KeyError: 'no space'"),
            ("BarrierTimeoutError", "rank 1: no space"),
            ("_Odd", "no space") if rank == 2 else ("RankFailedError", "rank 2 failed: _Odd: no space"),
            ("CheckpointError", "no space"),
        ]
        kind, text = seen["failure"]
        assert (kind, "disk full" in text) == ("KeyError" if rank == 0 else "ProcessGroupError", True)


def test_alone_everything_is_a_no_op() -> None:
    value = torch.tensor([1.0, 2.0])
    for _ in range(2):
        total = reduce_sum(value)
        assert torch.equal(total, value)
        assert total.data_ptr() != value.data_ptr()
        assert torch.equal(reduce_mean(value), value)
    decision = object()
    assert broadcast_decision(decision) is decision
    assert gather_objects(decision) == [decision]
    barrier()
    monitored_barrier(0.01)
    with main_first() as main:
        assert main
    assert _only_main(1) == 2
    assert _only_main.__doc__ == "Doc."


def _late(rank: int, port: int) -> Any:
    with join(rank=rank, world_size=3, master_port=port, timeout_s=60):
        monitored_barrier(30)
        if rank == 1:  # comes when the others have given up: they say so
            assert dist.recv(torch.zeros(1), src=0) == 0
        started = time.monotonic()
        try:
            monitored_barrier(0.5)
        except BarrierTimeoutError as error:
            if rank == 0:
                dist.send(torch.ones(1), dst=1)
            waited = time.monotonic() - started
            after = gather_objects(rank)  # the group is whole: a barrier in vain broke nothing
            monitored_barrier(30)
            return error.missing_ranks, str(error), waited, after
        return "passed"


def test_a_monitored_barrier_names_the_missing_on_every_rank(run_ranks: Run, free_port: int) -> None:
    ranks = run_ranks(_late, 3, free_port)
    for end in ranks:
        assert end.error is None, end
        missing, message, waited, after = end.value
        assert missing == (1,)
        assert "rank 1 (pid " in message
        assert "within 0.5 s" in message
        assert after == [0, 1, 2]
        assert waited < 20


def _dies(rank: int, port: int) -> None:
    import os

    with join(rank=rank, world_size=2, master_port=port, timeout_s=60):
        monitored_barrier(30)
        if rank == 0:
            os._exit(7)
        while True:  # rank 0 is gone at once or a moment later
            monitored_barrier(30)


def test_a_monitored_barrier_says_that_the_store_is_gone(run_ranks: Run, free_port: int) -> None:
    _, other = run_ranks(_dies, 2, free_port, timeout_s=30)
    assert other.error == "ProcessGroupError"
    assert "lost the store" in other.message
    assert "rank 0 (pid" in other.message


def test_works_beside_a_group_that_was_made_by_torch(run_ranks: Run, free_port: int) -> None:
    ranks = run_ranks(_by_torch, 2, free_port)
    for rank, end in enumerate(ranks):
        assert (end.error, end.value) == (None, (rank, 2, 1, [0, 1], "go")), end


def _by_torch(rank: int, port: int) -> Any:
    from everyrank.runtime.process_group import cleanup_ddp, current_world

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = current_world()
    total = int(reduce_sum(torch.tensor(rank)))
    monitored_barrier(30)
    result = world.rank, world.world_size, total, gather_objects(rank), broadcast_decision("go" if rank == 0 else None)
    cleanup_ddp()
    assert not dist.is_initialized()
    return result


@pytest.mark.parametrize("value", [torch.tensor(3), torch.tensor([True, False])])
def test_the_mean_of_integers_is_a_float(value: torch.Tensor) -> None:
    assert reduce_mean(value).is_floating_point()
