"""An exception is a rank's own, or tells of another rank: by type, by exact words, and by what it came from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from everyrank.diagnosis.classify import is_lost_peer, named_rank
from everyrank.errors import BarrierTimeoutError, RankFailedError, RendezvousError

GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. "
    "This is typically caused by a remote worker crashing."
)
LATE = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv"
)


def _wrapped(how: str) -> Exception:
    try:
        try:
            raise RuntimeError(GLOO)
        except RuntimeError as error:
            if how == "from":
                raise KeyError("training failed") from error
            if how == "from none":
                raise KeyError("training failed") from None
            raise KeyError("training failed")  # noqa: B904
    except KeyError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError(LATE),
        dist.DistNetworkError("The client socket has timed out after 600000ms"),
        dist.DistStoreError("wait timeout after 1000ms, keys: /everyrank/a"),
        dist.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"),
        RankFailedError("rank 1 failed", rank=1),
        BarrierTimeoutError("rank 1 did not come", [1]),
        _wrapped("from"),
        _wrapped("from none"),
        _wrapped("while handling"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_tells_of_another_rank(error: Exception) -> None:
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RuntimeError("my NCCL topology file is missing"),
        lambda: RuntimeError("Timed out waiting for clients of my own"),
        lambda: RuntimeError("the peer review is not finished"),
        lambda: RuntimeError("connection refused by the database"),
        lambda: RuntimeError("this model needs gloo"),
        lambda: dist.DistBackendError("NCCL error: invalid usage. Duplicate GPU detected"),
        lambda: ConnectionResetError("Connection reset by peer"),  # a socket of the program's own
        lambda: ValueError(GLOO),
        lambda: RendezvousError("rank 1 did not come within 1 s"),
    ],
)
def test_what_is_a_ranks_own(make: Callable[[], Exception]) -> None:
    assert not is_lost_peer(make())


def test_the_rank_that_an_exception_blames_itself() -> None:
    assert named_rank(RankFailedError("rank 3 failed", rank=3)) == 3
    assert named_rank(BarrierTimeoutError("ranks 1 and 2 did not come", [1, 2])) is None
    assert named_rank(_wrapped("from")) is None
