"""What this process remembers about the group it has joined. Torch has one default group a process, so has this."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed import Store

from everyrank.runtime.world import World


@dataclass(kw_only=True)
class Membership:
    """The joined group of this process.

    Attributes:
        world: The process's world.
        store: Key-value store of this group alone: its prefix is new for each attempt to join.
        base_store: The store under the prefix; keeps the server alive on the rank that hosts it.
        host: Address of the store's server if rank 0 runs it, else None.
        endpoint: Where the processes met, for messages.
        timeout_s: Timeout of the group.
        roster: For each rank, where it runs: ``"pid 7 on node1"``.
        num_barriers: How many monitored barriers this process has entered.
        saved_variables: Environment variables that were set while joined, and what they were before.
    """

    world: World
    store: Store
    base_store: Store
    host: tuple[str, int] | None
    endpoint: str
    timeout_s: float
    roster: list[str]
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
        return _current.store
    return dist.distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None
