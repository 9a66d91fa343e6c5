"""What a finished run left: the ledger of its committed steps, and its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from everyrank.checkpoint.checkpointer import read_checkpoint
from everyrank.checkpoint.folder import checkpoint_paths, first_whole
from everyrank.errors import CheckpointError
from everyrank.training.saving.ledger import read_ledger


@dataclass(frozen=True)
class Evidence:
    """What can be proved of a run.

    Attributes:
        weights: The model's tensors in its newest whole checkpoint, and those of their moving average, if there is one.
        uses: How often each sample was used in committed steps, by epoch.
        world_sizes: The world sizes of the committed steps, in order, without repetition.
        step: The newest checkpoint's step.
    """

    weights: dict[str, torch.Tensor]
    uses: dict[int, Counter[int]]
    world_sizes: tuple[int, ...]
    step: int

    @classmethod
    def of(cls, run: Path) -> Evidence:
        """Read a run's folder.

        Raises:
            CheckpointError: It has no whole checkpoint.
        """
        newest, _ = first_whole(reversed(checkpoint_paths(run / "checkpoints")))
        if newest is None:
            raise CheckpointError(f"{run} has no whole checkpoint")
        loaded = read_checkpoint(newest.path)
        uses: dict[int, Counter[int]] = {}
        entries = list(read_ledger(run / "ledger"))
        for entry in entries:
            uses.setdefault(entry["epoch"], Counter()).update(entry["samples"])
        sizes = (size for size, _ in groupby(entry["world_size"] for entry in entries))
        average = {f"average of {name}": tensor for name, tensor in loaded.tensors.get("ema", {}).items()}
        return cls({**loaded.tensors["model"], **average}, uses, tuple(sizes), newest.step)

    def exactly_once(self, reference: Evidence) -> bool:
        """Whether every epoch of the reference used the same samples here, each exactly once."""
        return self.uses.keys() == reference.uses.keys() and all(
            set(uses) == set(reference.uses[epoch]) and set(uses.values()) == {1} for epoch, uses in self.uses.items()
        )

    def difference(self, other: Evidence) -> float:
        """The largest absolute difference between two runs' weights; 0 means bitwise equal."""
        if self.weights.keys() != other.weights.keys():
            return float("inf")
        worst = 0.0
        for name, mine in self.weights.items():
            theirs = other.weights[name]
            if not torch.equal(mine, theirs):
                worst = max(worst, (mine.double() - theirs.double()).abs().max().item())
        return worst
