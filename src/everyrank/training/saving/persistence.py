"""The lasting side of a run: its checkpoints, its ledger, and where it goes on from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from everyrank.checkpoint.checkpointer import Checkpointer, LoadedCheckpoint
from everyrank.checkpoint.folder import list_checkpoints, new_token
from everyrank.runtime.agreement import agree
from everyrank.runtime.collectives import barrier, broadcast_decision, gather_objects
from everyrank.runtime.logs import get_logger
from everyrank.runtime.world import World
from everyrank.training.config import TrainingConfig
from everyrank.training.placement import set_aside
from everyrank.training.saving.ledger import Ledger
from everyrank.training.saving.reload import find_in
from everyrank.training.saving.saved import SavedTraining
from everyrank.training.seeding import capture_rng

logger = get_logger("training")

_LEFT_BY_A_RUN = ("checkpoints", "ledger", "history.jsonl", "tensorboard", "curves.png")


class Persistence:
    """Writes checkpoints and ledger together, and finds what to resume from. Every rank has one.

    Args:
        run: The run's folder.
        world: The joined world.
        config: The ``training`` section.
        device: This rank's device.

    Attributes:
        loaded: The checkpoint the run goes on from, or None.
        checkpointer: What writes the checkpoints.
        ledger: The ledger, or None.
    """

    def __init__(self, run: Path, world: World, config: TrainingConfig, device: torch.device) -> None:
        self._world, self._device = world, device
        after_save = config.after_save
        source = agree(lambda: _source(run, config.resume), on=0)
        self.checkpointer = Checkpointer(
            run / "checkpoints",
            world=world,
            keep_last=config.keep_last,
            keep_best=config.keep_best,
            keep_every=config.keep_every,
            metric_mode=config.best_mode,
            after_write=(lambda path: after_save(SavedTraining(path))) if after_save is not None else None,
        )
        found = self.checkpointer.latest() if config.resume == "auto" else source
        self.loaded: LoadedCheckpoint | None = self.checkpointer.load(found) if found is not None else None
        self._last_saved = self.loaded.step if self.loaded is not None else 0
        self.ledger = Ledger(run / "ledger", world) if config.ledger else None
        if self.ledger is not None:
            ledger = self.ledger
            agree(lambda: ledger.resume(self._last_saved), on=0)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Any],
        state: Mapping[str, Any],
        metric: float | None,
        own: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Save a checkpoint; it is written in the background. Collective.

        Args:
            step: Optimizer steps done.
            tensors: Groups of tensors that are the same on all ranks.
            state: What else is.
            metric: The value it is ranked by.
            own: What this rank holds by itself; None if no rank holds any.
        """
        if own is not None and not self._is_shared:
            own = None
        if self.ledger is not None:
            self.ledger.write_pending(step)
        rank_state = {"rng": capture_rng(self._device)}
        self.checkpointer.save(
            step, tensors=tensors, state=state, rank_state=rank_state, metric=metric, own_tensors=own
        )
        if self.ledger is not None:
            self.ledger.confirm(self._last_saved)  # save() has waited for the one before to be on disk
        self._last_saved = step

    @cached_property
    def _is_shared(self) -> bool:
        """Whether all ranks see rank 0's folder, so that each can write into a checkpoint. Collective."""
        folder = self.checkpointer.folder
        mark = folder / f".shared-{broadcast_decision(new_token())}"
        if self._world.is_main:
            mark.touch()
        barrier()
        is_shared = all(gather_objects(mark.exists()))
        if self._world.is_main:
            mark.unlink()
            if not is_shared:
                logger.warning(
                    "%s is not shared by all ranks, so checkpoints hold rank 0's state alone of what each rank has of "
                    "its own (optimizer states with local updates, PowerSGD's errors). Runs go on from them, but not "
                    "bitwise. Put training.path on a file system that all nodes share.",
                    folder,
                )
        return is_shared

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Collective."""
        agree(self.checkpointer.wait, on=0)
        if self.ledger is not None:
            self.ledger.confirm(self._last_saved)

    def say_what_changed(self, global_batch_size: int) -> None:
        """Log on rank 0 how this run's world differs from the one that saved the checkpoint."""
        if self.loaded is None or not self._world.is_main or self.loaded.world_size == self._world.size:
            return
        before, now = self.loaded.world_size, self._world.size
        logger.info(
            "World size changed from %d to %d: the global batch stays %d, so each rank now takes %s samples of it "
            "(before: %s); each rank's own randomness starts anew",
            *(before, now, global_batch_size, _per_rank(global_batch_size, now), _per_rank(global_batch_size, before)),
        )


def _source(run: Path, resume: str) -> Path | None:
    """Return the checkpoint that was asked for by path, and set aside what an earlier run left in the way."""
    if resume == "auto":
        return None
    if resume == "never":
        moved = set_aside(run, _LEFT_BY_A_RUN)
        if moved is not None:
            logger.info("training.resume is never: what an earlier run left is now in %s", moved)
        return None
    source = find_in(Path(os.path.expanduser(resume)))
    here = run / "checkpoints"
    if source.parent.resolve() != here.resolve():
        moved = set_aside(run, _LEFT_BY_A_RUN)
        if moved is not None:
            logger.info("training.resume is %s: what an earlier run left here is now in %s", resume, moved)
        return source
    found = list_checkpoints(here, verify=False)
    step = next(info.step for info in found if info.path.name == source.name)
    for info in found:
        if info.step > step:
            # Later checkpoints belong to a future this run does not take; `auto` must not find them next time.
            os.replace(info.path, run / f"unused-{info.path.name}")
            logger.info("going back to step %d: %s is now %s", step, info.path.name, run / f"unused-{info.path.name}")
    return source


def _per_rank(global_batch_size: int, world_size: int) -> str:
    size, extra = divmod(global_batch_size, world_size)
    return f"{size} or {size + 1}" if extra else str(size)
