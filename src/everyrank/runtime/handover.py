"""Rank 0's result of what it does alone, for ranks that ask for it: over the store, never collective.

Rank 0 waits for nobody: it may be the only one that is still there. The others wait as long as rank 0 shows signs of
life.
"""

from __future__ import annotations

import base64
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from everyrank.errors import ProcessGroupError, RankFailedError
from everyrank.runtime.membership import find_store, get_membership
from everyrank.runtime.world import World

T = TypeVar("T")

logger = logging.getLogger(__name__)

_BEAT_S = 1.0
_PAUSE_S = 0.05
_TIMEOUT_S = 600.0  # where the group was made by torch, which does not say what its timeout is


class Handover:
    """Gives rank 0's results to the ranks that ask for them.

    Args:
        world: The joined world.
        token: The same on all ranks, and nobody else's.
    """

    def __init__(self, world: World, token: str) -> None:
        self._world, self._token = world, token
        self._calls: Counter[str] = Counter()
        self._num_beats, self._last_beat = 0, 0.0

    def run(self, what: str, work: Callable[[Callable[[], None]], T]) -> T:
        """Return what ``work`` returns on rank 0, which alone runs it. Not collective.

        Args:
            what: Tells different pieces of work apart, in words. A rank's n-th call of the same work is given the
                result of rank 0's n-th.
            work: Is given a function to call now and then, which costs next to nothing.

        Raises:
            RankFailedError: On another rank, if the work failed on rank 0.
            ProcessGroupError: On another rank, if rank 0 does not do the work, or this rank has left the group.
        """
        self._calls[what] += 1
        key = f"everyrank/{self._token}/{what}/{self._calls[what]}"
        if not self._world.is_main:
            taken: T = self._take(key, what)
            return taken
        try:
            result = work(lambda: self._beat(key))
        except BaseException as error:
            self._give(key, (False, f"{type(error).__name__}: {error}"))
            raise
        self._give(key, (True, result))
        return result

    def _beat(self, key: str) -> None:
        if time.monotonic() - self._last_beat > _BEAT_S:
            self._num_beats, self._last_beat = self._num_beats + 1, time.monotonic()
            self._set(f"{key}/beat", str(self._num_beats))

    def _give(self, key: str, result: tuple[bool, object]) -> None:
        self._set(f"{key}/result", base64.b64encode(pickle.dumps(result)).decode())

    def _set(self, key: str, value: str) -> None:
        store = find_store()
        if store is None:
            return  # the group has been left, so nobody can ask
        try:
            store.set(key, value)
        except (dist.DistError, RuntimeError) as error:
            logger.debug("nobody can be told: %s", error)

    def _take(self, key: str, what: str) -> Any:
        rank, store, membership = self._world.rank, find_store(), get_membership()
        if store is None:
            raise ProcessGroupError(
                f"rank {rank} asked for rank 0's {what}, but has left the process group. Fix: call it before "
                "cleanup_ddp(), or on rank 0 alone."
            )
        timeout_s = membership.timeout_s if membership is not None else _TIMEOUT_S
        beat, alive = b"", time.monotonic()
        try:
            while not store.check([f"{key}/result"]):
                if store.check([f"{key}/beat"]) and (newest := store.get(f"{key}/beat")) != beat:
                    beat, alive = newest, time.monotonic()
                has_left = store.check(["left/0"])
                if time.monotonic() - alive > timeout_s or (not beat and has_left):
                    if store.check([f"{key}/result"]):
                        break  # rank 0 has given it and left since the look above
                    why = "has left" if has_left else f"has given no sign of it for {timeout_s:g} s"
                    raise ProcessGroupError(
                        f"rank {rank} waits for rank 0's {what}, but rank 0 {why}. Fix: call it on rank 0 too."
                    )
                time.sleep(_PAUSE_S)
            done, result = pickle.loads(base64.b64decode(store.get(f"{key}/result")))
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, ProcessGroupError):
                raise
            raise ProcessGroupError(
                f"rank {rank} waits for rank 0's {what}, but lost the store: rank 0, or what hosts the store, has left "
                "or died. Fix: call it on rank 0 too, and look at the log of rank 0."
            ) from error
        if not done:
            raise RankFailedError(f"rank 0 failed: {result}", rank=0)
        return result
