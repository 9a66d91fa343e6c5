"""The world a process has joined: its place in the run, its device and its backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from everyrank.launch_env.process_environment import ProcessEnvironment


@dataclass(frozen=True, kw_only=True)
class World:
    """One process's view of the processes that train together.

    Attributes:
        environment: What the launcher said.
        device: The device of this local rank.
        backend: Backend of the process group, for example ``"gloo"`` or ``"nccl"``.
    """

    environment: ProcessEnvironment
    device: torch.device
    backend: str

    @property
    def rank(self) -> int:
        """Index of this process among all."""
        return self.environment.rank

    @property
    def local_rank(self) -> int:
        """Index of this process among those of its node."""
        return self.environment.local_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.environment.world_size

    @property
    def local_world_size(self) -> int:
        """Number of processes on this node."""
        return self.environment.local_world_size

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self.environment.node_rank

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.environment.num_nodes

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
