"""Is an exception a rank's own, or does it only tell of another rank that is gone, does not come, or departs?

By the exception's type and by the exact words of torch, gloo, NCCL and the stores, through ``__cause__`` and
``__context__``: a peer's error that a program wraps in its own is still a peer's. Words that a person may write in a
message of their own ("peer", "NCCL", "timed out waiting") do not count by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from everyrank.errors import BarrierTimeoutError, RankFailedError, UserError

_MAX_CHAIN = 20
# By name: a process that has not imported torch must not do so to judge an exception.
_LOST_PEER_TYPES = {"DistNetworkError", "DistStoreError"}
_LOST_PEER = re.compile(
    r"\[\S*gloo/transport/\S+:\d+\] "  # gloo begins with the place in its source, whatever it then says
    r"|^Application timeout caused pair closure|^Gloo connectFullMesh failed"
    r"|^\[?Rank \d+\]?:? .*monitoredBarrier"
    r"|^Detected mismatch between collectives on ranks"
    r"|NCCL communicator was aborted|ncclRemoteError: "
    r"|Watchdog caught collective operation timeout"
    r"|wait timeout after \d+ms, keys:|^Timed out after \d+ seconds waiting for clients"
    r"|Failed to (recv|send), (got|sent) 0 bytes\. Connection was likely closed|^The client socket has timed out"
)
_MISMATCH = re.compile(
    r"Received data size doesn't match expected size|op\.preamble\.length <= op\.nbytes"
    r"|Detected mismatch between collectives on ranks"
)
OUT_OF_MEMORY = {"MemoryError", "OutOfMemoryError"}


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those it came from, outermost first."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen and len(seen) < _MAX_CHAIN:
        yield now
        seen.add(id(now))
        now = now.__cause__ or now.__context__


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception came of another rank: one that is gone, did not come, or sent something else."""
    if isinstance(error, UserError):
        return False
    return any(_tells_of_peer(link) for link in chain(error))


def is_mismatch(text: str) -> bool:
    """Whether these are words of torch's or gloo's about ranks that take part with different things."""
    return bool(_MISMATCH.search(text))


def named_rank(error: BaseException) -> int | None:
    """The rank that an exception itself blames, or None."""
    for link in chain(error):
        if isinstance(link, RankFailedError):
            return link.rank
        if isinstance(link, BarrierTimeoutError) and len(link.missing_ranks) == 1:
            return link.missing_ranks[0]
    return None


def _tells_of_peer(error: BaseException) -> bool:
    if isinstance(error, RankFailedError | BarrierTimeoutError):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & _LOST_PEER_TYPES:
        return True
    return "RuntimeError" in names and bool(_LOST_PEER.search(str(error)))
