"""What this process remembers about the group it has joined. Torch has one default group a process, so has this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed import Store

from everyrank.runtime.world import World

if TYPE_CHECKING:
    from everyrank.rendezvous.handshake import Handshake


@dataclass(kw_only=True)
class Membership:
    """The joined group of this process.

    Attributes:
        world: The process's world.
        handshake: Where the processes met, the store of this group alone, and where each rank runs.
        timeout_s: Timeout of the group.
        num_barriers: How many monitored barriers this process has entered.
        saved_variables: Environment variables that were set while joined, and what they were before.
    """

    world: World
    handshake: Handshake
    timeout_s: float
    num_barriers: int = 0
    saved_variables: dict[str, str | None] = field(default_factory=dict)


_current: Membership | None = None


def get_membership() -> Membership | None:
    """Return the group this process has joined through everyrank, or None."""
    return _current


def set_membership(membership: Membership | None) -> None:
    """Remember (or forget) the group this process has joined."""
    global _current
    _current = membership


def find_store() -> Store | None:
    """Return the store of the group this process is in, whoever made it, or None."""
    if _current is not None:
        return _current.handshake.store
    return dist.distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None
