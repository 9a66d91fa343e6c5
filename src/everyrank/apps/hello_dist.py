"""Every rank says hello, and a sum over the ranks proves that they reach each other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from everyrank import EveryrankError, barrier, join, reduce_sum

if TYPE_CHECKING:
    from omegaconf import DictConfig


class HelloDist:
    """The smallest distributed program: it works under every driver, on every backend, at any world size."""

    def run(self, cfg: DictConfig) -> dict[str, int]:
        """Greet, sum the ranks, and check the sum.

        Returns:
            The world size and the sum.

        Raises:
            EveryrankError: The sum is wrong.
        """
        with join(**cfg.distributed) as world:
            print(f"[Rank {world.rank}/{world.world_size}] {cfg.app.message}", flush=True)
            print(f"[Rank {world.rank}/{world.world_size}] Local rank: {world.local_rank}", flush=True)
            print(f"[Rank {world.rank}/{world.world_size}] Process ID: {os.getpid()}", flush=True)
            total = int(reduce_sum(torch.tensor(world.rank, device=world.device)).item())
            expected = world.world_size * (world.world_size - 1) // 2
            barrier()
            if world.is_main:
                print(f"[Rank 0] Sum of all ranks: {total}")
                print(f"[Rank 0] Expected sum: {expected}")
            if total != expected:
                raise EveryrankError(f"rank {world.rank} got {total} as the sum of all ranks, expected {expected}")
            if world.is_main:
                print("[Rank 0] ✓ Collective operation successful!")
                print(f"[Rank 0] All {world.world_size} processes completed successfully!", flush=True)
            return {"world_size": world.world_size, "sum": total}
