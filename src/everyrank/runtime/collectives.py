"""What the processes of a run do together. Every function is a no-op at world size 1, or where no group is joined."""

from __future__ import annotations

import functools
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from everyrank.errors import BarrierTimeoutError, ProcessGroupError
from everyrank.runtime.membership import Membership, get_membership
from everyrank.runtime.world import World

T = TypeVar("T")
P = ParamSpec("P")

_LOOK_EVERY_S = 0.5  # how often a rank that waits asks who has left
_DECISION_BYTES = 64
_PAYLOAD_BYTES = _DECISION_BYTES - 2
_PICKLED, _NONE, _FALSE, _TRUE, _INT, _FLOAT, _TEXT, _LONG = range(8)


def reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Return the sum over ranks of ``value`` as a new tensor of the same shape, on every rank.

    Collective. Not differentiable.
    """
    result = value.detach().clone()
    if _num_ranks() > 1:
        dist.all_reduce(result)
    return result


def reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """Return the mean over ranks of ``value`` as a new tensor of the same shape, on every rank.

    Collective. Not differentiable. Integer tensors give the default floating-point type.
    """
    if not (value.is_floating_point() or value.is_complex()):
        value = value.to(torch.get_default_dtype())
    return reduce_sum(value) / _num_ranks()


def gather_objects(value: T) -> list[T]:
    """Return every rank's ``value``, ordered by rank, on every rank.

    Collective. The values are pickled: meant for small things.
    """
    size = _num_ranks()
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_decision(value: T, src: int = 0) -> T:
    """Return rank ``src``'s ``value`` on every rank; what the others pass is ignored.

    Collective. None, bool, int (64 bits), float and short text travel in one message of 64 bytes, so that this can be
    called in every step; anything else is pickled and takes a second message.

    Args:
        value: The decision, on rank ``src``.
        src: The rank that decides.
    """
    if _num_ranks() == 1:
        return value
    device, decides = _control_device(), dist.get_rank() == src
    pickled = b""
    message = bytearray(_DECISION_BYTES)
    if decides:
        kind, payload = _encode(value)
        if kind == _LONG:
            pickled, payload = payload, struct.pack("<q", len(payload))
        message[0], message[1] = kind, len(payload)
        message[2 : 2 + len(payload)] = payload
    buffer = torch.frombuffer(message, dtype=torch.uint8).to(device)
    dist.broadcast(buffer, src)
    received = bytes(buffer.cpu().tolist())
    if received[0] == _LONG:
        (length,) = struct.unpack("<q", received[2:10])
        body = torch.frombuffer(bytearray(pickled or bytes(length)), dtype=torch.uint8).to(device)
        dist.broadcast(body, src)
        return value if decides else pickle.loads(body.cpu().numpy().tobytes())
    return value if decides else _decode(received)


def barrier() -> None:
    """Wait until every rank is here. Collective."""
    if _num_ranks() > 1:
        dist.barrier()


def monitored_barrier(timeout_s: float, *, name: str | None = None) -> None:
    """Wait until every rank is here, and say which are not.

    Collective. It runs over the store and not over the backend, so that it works with every backend, also beside a
    collective that hangs. All ranks come to the same verdict, that of the first whose time is up. A rank that has left
    the group is not waited for.

    Args:
        timeout_s: How long a rank waits for the others, in seconds.
        name: What is to be done when all are here, for messages; by default the barrier's number.

    Raises:
        BarrierTimeoutError: On every rank that came (late ones too); it names the ranks that did not come in time, or
            have left.
        ProcessGroupError: The store is gone, because the rank that hosts it left or died.
    """
    size, membership = _num_ranks(), get_membership()
    if size == 1:
        return
    if membership is None:
        dist.monitored_barrier(timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
        return
    membership.num_barriers += 1
    number, rank, store = membership.num_barriers, membership.world.rank, membership.handshake.store
    prefix, started, name = f"barrier/{number}", time.monotonic(), name or f"monitored barrier {number}"
    try:
        store.set(f"{prefix}/{rank}", "1")
        if store.add(f"{prefix}/count", 1) == size:
            store.compare_set(f"{prefix}/verdict", "", "all")
        if not _await_verdict(store, prefix, size, timeout_s):
            missing = [r for r in range(size) if not store.check([f"{prefix}/{r}"])]
            # compare_set lets one verdict win, so that no rank passes a barrier that another saw fail
            store.compare_set(f"{prefix}/verdict", "", ",".join(map(str, missing)) or "all")
        verdict = store.get(f"{prefix}/verdict").decode()
        if verdict == "all" and rank == 0 and number > 1:
            for key in ("count", "verdict", *map(str, range(size))):  # all have left the barrier before this one
                store.delete_key(f"barrier/{number - 1}/{key}")
    except (dist.DistError, RuntimeError) as error:
        raise ProcessGroupError(
            f"rank {rank} lost the store at {membership.handshake.rendezvous.endpoint} in a monitored barrier: the "
            f"process that hosts it left or died. Look at the log of rank 0 ({membership.handshake.places[0]})."
        ) from error
    if verdict != "all":
        missing = [int(r) for r in verdict.split(",")]
        raise BarrierTimeoutError(
            f"{name}: {_absent(membership, missing, timeout_s)}; "
            f"rank {rank} waited {time.monotonic() - started:.1f} s. "
            "Fix: call it on every rank, and look at the logs of the ranks named.",
            missing,
        )


def _await_verdict(store: dist.Store, prefix: str, size: int, timeout_s: float) -> bool:
    """Wait for a barrier's verdict; False if there is none in time, or a rank that did not come has left the group.

    It asks again and again: torch's own wait can neither be interrupted nor notice who has left.
    """
    deadline, look_at, pause_s = time.monotonic() + timeout_s, time.monotonic() + _LOOK_EVERY_S, 0.001
    while not store.check([f"{prefix}/verdict"]):
        now = time.monotonic()
        if now >= deadline:
            return False
        if now >= look_at:
            look_at = now + _LOOK_EVERY_S
            if any(store.check([f"left/{r}"]) and not store.check([f"{prefix}/{r}"]) for r in range(size)):
                return False
        time.sleep(min(pause_s, deadline - now))
        pause_s = min(2 * pause_s, 0.05)
    return True


def _absent(membership: Membership, missing: list[int], timeout_s: float) -> str:
    left = [r for r in missing if membership.handshake.store.check([f"left/{r}"])]
    late = [r for r in missing if r not in left]

    def names(ranks: list[int]) -> str:
        return ", ".join(f"rank {r} ({membership.handshake.places[r]})" for r in ranks)

    parts = [f"{names(left)} left the run before it"] if left else []
    parts += [f"{names(late)} did not come within {timeout_s:g} s"] if late else []
    return "; ".join(parts)


def all_here(name: str, world: World) -> None:
    """Wait until every rank is about to do ``name``, at most for the group's timeout, and say which rank is not.

    Collective. In a group that was made by torch nothing is waited for.

    Raises:
        BarrierTimeoutError: A rank did not come, or has left.
        ProcessGroupError: This rank itself has left.
    """
    membership = get_membership()
    if membership is not None:
        monitored_barrier(membership.timeout_s, name=name)
    elif world.is_distributed and not dist.is_initialized():
        raise ProcessGroupError(
            f"{name} needs all {world.world_size} ranks, but rank {world.rank} has left the process group. Fix: call "
            "it before cleanup_ddp(), on every rank."
        )


def rank_zero_only(fn: Callable[P, T]) -> Callable[P, T | None]:
    """Decorate ``fn`` to run on rank 0 only; on the other ranks it returns None. Not collective."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return fn(*args, **kwargs) if current_rank() == 0 else None

    return wrapper


@contextmanager
def main_first() -> Iterator[bool]:
    """Run the block on rank 0 first, then on the others, as for a download that all then find in the cache.

    Collective. An exception on rank 0 reaches the others as a ProcessGroupError, so that none waits for nothing.

    Yields:
        Whether this is rank 0.
    """
    main = current_rank() == 0
    if not main:
        failure = broadcast_decision("")
        if failure:
            raise ProcessGroupError(f"rank 0 failed in main_first, so rank {current_rank()} did not start: {failure}")
        yield False
        return
    try:
        yield True
    except BaseException as error:
        broadcast_decision(f"{type(error).__name__}: {error}")
        raise
    broadcast_decision("")


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def current_rank() -> int:
    """Return this process's rank in the joined group, or 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _control_device() -> torch.device:
    """Return where small control messages live: the CPU, unless the group moves CUDA tensors only."""
    membership = get_membership()
    if membership is None and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _encode(value: object) -> tuple[int, bytes]:
    if value is None:
        return _NONE, b""
    if isinstance(value, bool):
        return (_TRUE if value else _FALSE), b""
    if type(value) is int and -(2**63) <= value < 2**63:
        return _INT, struct.pack("<q", value)
    if type(value) is float:
        return _FLOAT, struct.pack("<d", value)
    if type(value) is str and len(value.encode()) <= _PAYLOAD_BYTES:
        return _TEXT, value.encode()
    pickled = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return (_PICKLED if len(pickled) <= _PAYLOAD_BYTES else _LONG), pickled


def _decode(message: bytes) -> Any:
    kind, payload = message[0], message[2 : 2 + message[1]]
    if kind == _INT:
        return struct.unpack("<q", payload)[0]
    if kind == _FLOAT:
        return struct.unpack("<d", payload)[0]
    if kind == _TEXT:
        return payload.decode()
    if kind == _PICKLED:
        return pickle.loads(payload)
    return {_NONE: None, _FALSE: False, _TRUE: True}[kind]
