"""Saying which rank failed, where, and on which samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from everyrank.diagnosis.classify import is_lost_peer
from everyrank.errors import EveryrankError, RankFailedError, UserError
from everyrank.runtime.logs import get_logger
from everyrank.runtime.membership import find_store
from everyrank.runtime.world import World

logger = get_logger("training")

_KEY = "everyrank/training/failure"
_MAX_SHOWN = 64


class SignalNoticed(Exception):
    """All ranks agreed to stop here because of a signal; not a failure, and never seen outside of the trainer."""


def describe_samples(samples: Sequence[int]) -> str:
    """Return sample ids as text, shortened if there are very many."""
    shown = ", ".join(str(int(sample)) for sample in samples[:_MAX_SHOWN])
    return f"[{shown}{', ...' if len(samples) > _MAX_SHOWN else ''}]"


def explain(error: Exception, world: World, where: str) -> Exception:
    """Return the exception to raise for ``error``, which says which rank failed first.

    On the rank that failed on its own account that is ``error`` with a note. A rank that only lost its peers raises a
    RankFailedError that names the guilty one, as far as that could still tell.

    Args:
        error: What was raised.
        world: The joined world.
        where: Epoch, step and samples.
    """
    if isinstance(error, RankFailedError):
        return error
    note = f"on rank {world.rank}, {where}"
    guilty = _published(world) if is_lost_peer(error) else None
    if guilty is not None and guilty["rank"] != world.rank:
        failure = RankFailedError(
            f"rank {guilty['rank']} failed: {guilty['error']} ({guilty['where']}). "
            f"Rank {world.rank} only lost contact.",
            rank=guilty["rank"],
        )
        failure.add_note(note)
        return failure
    if not is_lost_peer(error):
        _publish(error, world, note)
        error.add_note(note)
        if not isinstance(error, UserError | EveryrankError):
            logger.error("%s: %s (%s)", type(error).__name__, error, note)
    return error


def _publish(error: Exception, world: World, where: str) -> None:
    if not world.is_distributed:
        return
    store = find_store()
    if store is None:
        return
    try:
        message = json.dumps({"rank": world.rank, "error": f"{type(error).__name__}: {error}", "where": where})
        store.compare_set(_KEY, "", message)  # the first failure stays
    except (dist.DistError, RuntimeError) as problem:
        logger.debug("the failure could not be told to the other ranks: %s", problem)


def _published(world: World) -> dict[str, Any] | None:
    try:
        store = find_store()
        return json.loads(store.get(_KEY)) if store is not None and store.check([_KEY]) else None
    except (dist.DistError, RuntimeError) as problem:
        logger.debug("rank %d cannot ask who failed: %s", world.rank, problem)
        return None
