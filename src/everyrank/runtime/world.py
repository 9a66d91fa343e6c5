"""The world a process has joined: its place in the run, its device and its backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from everyrank.launch_env.process_environment import ProcessEnvironment


@dataclass(frozen=True, kw_only=True)
class World(ProcessEnvironment):
    """One process's view of the processes that train together: the place that its launcher gave it, and more.

    Attributes:
        device: The device of this local rank.
        backend: Backend of the process group, for example ``"gloo"`` or ``"nccl"``.
    """

    device: torch.device
    backend: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its node."""
        return self.local_rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1
