"""One rank's error raised on all ranks, so that none waits for a rank that failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from everyrank import errors
from everyrank.errors import RankFailedError
from everyrank.runtime.collectives import broadcast_decision, current_rank, gather_objects

T = TypeVar("T")


class _Failure(NamedTuple):
    """An exception as it travels: its class if it is one of ours, and its text."""

    class_name: str
    text: str


def agree(work: Callable[[], T], *, on: int | None = None) -> T:
    """Do ``work`` together: either it is done on all ranks, or all ranks raise. Collective.

    Args:
        work: What to do.
        on: The only rank that does it, whose result all ranks get (pickled). None: every rank does it and keeps its
            own result.

    Raises:
        EveryrankError: On all ranks, if the first rank that failed raised one of ``everyrank.errors``: the same class,
            and the same words, which name the rank if it is not rank 0.
        Exception: For any other exception: itself where it was raised, and a RankFailedError on the other ranks.
    """
    if on is None:
        result, error = _attempt(work)
        _raise_together(gather_objects(_failure(error)), error)
        return result[0]
    result, error = _attempt(work) if current_rank() == on else ([], None)
    failure, value = broadcast_decision((_failure(error), result[0] if result else None), src=on)
    _raise_together([*[None] * on, failure], error)
    return value  # type: ignore[return-value]


def gather_agreed(work: Callable[[], T]) -> list[T]:
    """Like :func:`agree` on every rank, and return all ranks' results (pickled), ordered by rank. Collective."""
    result, error = _attempt(work)
    gathered = gather_objects((_failure(error), result[0] if result else None))
    _raise_together([failure for failure, _ in gathered], error)
    return [value for _, value in gathered]  # type: ignore[misc]


def _attempt(work: Callable[[], T]) -> tuple[list[T], Exception | None]:
    try:
        return [work()], None
    except Exception as error:
        return [], error


def _failure(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    name, text = type(error).__name__, str(error)
    ours = getattr(errors, name, None) is type(error)
    return _Failure(name, text) if ours else _Failure("", f"{name}: {text}")


def _raise_together(failures: Sequence[_Failure | None], own: Exception | None) -> None:
    """Raise the error of the first rank that has one: in the same words on all ranks, if its class is ours."""
    rank = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
    failure = None if rank is None else failures[rank]
    if rank is None or failure is None:
        return
    kind = getattr(errors, failure.class_name) if failure.class_name else None
    if own is not None and (kind is None or rank == 0):
        raise own
    try:
        error = kind(f"rank {rank}: {failure.text}" if rank else failure.text) if kind else None
    except TypeError:  # its exceptions are made from more than a message
        error = None
    raise error or own or RankFailedError(f"rank {rank} failed: {failure.text}", rank=rank) from own
