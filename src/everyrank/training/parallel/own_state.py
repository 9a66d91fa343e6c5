"""What each rank holds by itself, in a checkpoint: with local updates the optimizer's state, with PowerSGD its errors.

Rank 0's optimizer lies where every run's does, so that anything reads it. The other ranks each write a file of their
own, which needs a folder that all share. At the world size of the checkpoint each rank gets back what it had; at
another one, all ranks get the mean over the ranks that saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from everyrank.checkpoint.encoding import flatten_state, unflatten_state
from everyrank.checkpoint.reading import LoadedCheckpoint
from everyrank.runtime.logs import get_logger
from everyrank.runtime.world import World
from everyrank.training.parts import Parts

logger = get_logger("training")

_REST = "$rest"


def pack_own(rank: int, parts: Parts) -> dict[str, Tensor] | None:
    """Return the tensors of a rank's own file; empty if it has nothing of its own, None if no rank has."""
    if parts.local is None and parts.powersgd is None:
        return None
    own: dict[str, Any] = {}
    if parts.local is not None and rank > 0:
        own["optimizer"] = parts.optimizer.state_dict()
        if parts.scaler is not None:
            own["scaler"] = parts.scaler.state_dict()
    if parts.powersgd is not None:
        own["powersgd"] = parts.powersgd.own_state()
    if not own:
        return {}
    tensors, rest = flatten_state(own)
    tensors[_REST] = torch.frombuffer(bytearray(json.dumps(rest, allow_nan=False).encode()), dtype=torch.uint8)
    return tensors


class OwnStates:
    """The ranks' own states in a checkpoint.

    Args:
        loaded: The checkpoint.
        world: The world that goes on from it.
        keep: Whether this run's ranks have optimizer states of their own.
    """

    def __init__(self, loaded: LoadedCheckpoint, world: World, *, keep: bool) -> None:
        self._loaded, self._rank = loaded, world.rank
        self._same_size = loaded.world_size == world.world_size
        self._keep = keep

    @cached_property
    def mine(self) -> dict[str, Any]:
        """What this rank held at this world size; empty at another."""
        return self._of(self._rank) if self._same_size else {}

    def optimizer_state(self) -> Any:
        """Return the optimizer's state of this rank, or the mean over the ranks that saved."""
        if self._keep and "optimizer" in self.mine:
            return self.mine["optimizer"]
        loaded = self._loaded
        tensors, rest = loaded.tensors.get("optimizer", {}), loaded.state["optimizer"]
        if self._keep and self._same_size and self._rank == 0:
            return unflatten_state(tensors, rest)
        others = [own["optimizer"] for own in map(self._of, range(1, loaded.world_size)) if "optimizer" in own]
        if others:
            tensors = _mean([tensors, *(flatten_state(state)[0] for state in others)])
            if self._rank == 0:
                logger.info("Each rank's optimizer goes on from the mean of the %d saved states", len(others) + 1)
        return unflatten_state(tensors, rest)

    def powersgd_errors(self) -> dict[str, Tensor]:
        """Return what this rank has not sent yet; at another world size the mean, so that nothing is lost."""
        if self._same_size:
            return self.mine.get("powersgd", {})
        found = [own["powersgd"] for own in map(self._of, range(self._loaded.world_size)) if "powersgd" in own]
        return _mean(found) if found else {}

    def _of(self, rank: int) -> dict[str, Any]:
        tensors = self._loaded.own_tensors(rank)
        if not tensors:
            return {}
        rest = json.loads(tensors.pop(_REST).numpy().tobytes())
        return unflatten_state(tensors, rest)


def _mean(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of several ranks' tensors by name, where they are floating-point; otherwise the first rank's.

    Args:
        states: Each rank's tensors. Names are those of the first; a rank without one is left out of its mean.
    """
    means = {}
    for name, first in states[0].items():
        found = [state[name] for state in states if name in state and state[name].shape == first.shape]
        means[name] = torch.stack(found).mean(dim=0) if first.is_floating_point() or first.is_complex() else first
    return means
