"""The lasting side of a run: its checkpoints, its ledger, and where it goes on from."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from everyrank.checkpoint.checkpointer import Checkpointer, LoadedCheckpoint
from everyrank.checkpoint.folder import new_token, said_plainly
from everyrank.checkpoint.rng import capture_rng
from everyrank.config.yaml_loader import to_yaml
from everyrank.errors import CheckpointError, ConfigError
from everyrank.runtime.agreement import agree
from everyrank.runtime.collectives import barrier, broadcast_decision, gather_objects
from everyrank.runtime.logs import get_logger
from everyrank.runtime.run_lock import RunLock
from everyrank.runtime.world import World
from everyrank.training.config import TrainerConfig
from everyrank.training.placement import log_to
from everyrank.training.saving.changes import Change, Fate, effective, find_changes, refuse
from everyrank.training.saving.ledger import Ledger, replace_file
from everyrank.training.saving.replay import Replay
from everyrank.training.saving.saved import SavedTraining
from everyrank.training.saving.start import TRIAL_MARK, Start, find_start, make_way

logger = get_logger("training")

# The lock is the process's: of two trainers in it, the one that has not seen the other's checkpoints must not write.
_num_saves: Counter[str] = Counter()


class Persistence:
    """Writes checkpoints and ledger together, and finds what to resume from. Every rank has one.

    To make one reads; ``begin`` is the first that writes, and only if no other process writes there.

    Args:
        run: The run's folder.
        config: The whole configuration.
        world: The joined world.
        device: This rank's device.

    Attributes:
        loaded: The checkpoint the run goes on from, or None.
        changes: The settings that differ from those it was made with.
        checkpointer: What writes the checkpoints.
        ledger: The ledger, or None.

    Raises:
        ConfigError: Settings differ that cannot be changed.
        CheckpointError: The checkpoint that was named is not there or damaged.
    """

    def __init__(self, run: Path, config: TrainerConfig, world: World, device: torch.device) -> None:
        self._run, self._config, self._world, self._device = run, config, world, device
        self._lock: RunLock | None = None
        self._why_not = ""  # why nothing is written, if nothing is
        self._place = os.path.realpath(run)
        self._num_saves = _num_saves[self._place]
        training = config.training
        after_save = training.after_save
        self._start = agree(self._look, on=0)
        self.checkpointer = Checkpointer(
            run / "checkpoints",
            world=world,
            keep_last=training.keep_last,
            keep_best=training.keep_best,
            keep_every=training.keep_every,
            metric_mode=training.best_mode,
            after_write=(lambda path: after_save(SavedTraining(path))) if after_save is not None else None,
            prepare=False,
        )
        found = self.checkpointer.latest() if self._start.kind == "auto" else self._start.source
        self.loaded: LoadedCheckpoint | None = self.checkpointer.load(found) if found is not None else None
        self.changes: list[Change] = agree(self._compare, on=0)
        self._last_saved = self.loaded.step if self.loaded is not None else 0
        self._metric = self.loaded.metric if self.loaded is not None else None
        self.ledger: Ledger | None = None

    def begin(self, *, is_over: bool) -> Path | None:
        """Make the folder ready to be written to, unless another process writes there. Collective.

        Args:
            is_over: Whether nothing is left to train.

        Returns:
            The file of the history, on the rank that writes it.

        Raises:
            ConfigError: Settings differ that a run which is complete cannot have, or the folder cannot be written to.
        """
        self._why_not = agree(lambda: self._take(is_over), on=0)
        if self._why_not:
            if self._world.is_main:
                logger.warning("%s %s: it is only read", self._run, self._why_not)
            return None
        log_to(self._run / "logs" / f"rank-{self._world.rank}.log", self._world.rank)
        agree(self.checkpointer.prepare, on=0)
        if self._is_sharded:
            self.checkpointer.sharded = self._is_shared
        if self._config.training.ledger:
            self.ledger = ledger = Ledger(self._run / "ledger", self._world)
            agree(lambda: ledger.resume(self._last_saved), on=0)
        if self._world.is_main:
            for change in self.changes:
                level = logging.WARNING if change.fate is Fate.KEPT else logging.INFO
                logger.log(level, "%s; it is %s", change, "kept" if change.fate is Fate.KEPT else "applied")
            if self.loaded is not None:
                epoch, step = self.loaded.state["position"]["epoch"], self.loaded.step
                logger.info("Resuming from %s: epoch %d, step %d", self.loaded.path, epoch, step)
        return self._run / "history.jsonl" if self._world.is_main else None

    @property
    def _is_sharded(self) -> bool:
        """Whether each rank holds a part of the model."""
        return self._config.is_sharded and self._world.is_distributed

    def need_to_write(self, what: str) -> None:
        """Raise where this run is only read, or has gone on without this trainer.

        Raises:
            ConfigError: On all ranks.
        """
        if self._num_saves != _num_saves[self._place]:
            raise ConfigError(
                f"{what} was called, but another trainer of this process has saved checkpoints in {self._run} since: "
                "this one would train on its samples again. Fix: make a new trainer, which goes on from the newest "
                "checkpoint, or give each a training.path of its own."
            )
        if self._why_not:
            raise ConfigError(
                f"{what} was called, but the run's folder {self._run} {self._why_not}. Fix: wait until that run ends "
                "and make a new trainer, or name another training.path."
            )

    def mark_trial(self, number: int | None) -> None:
        """Note that this run is of one trial of a study; rank 0 calls it.

        Raises:
            UnwritableError: It cannot be written.
        """
        mark = self._run / TRIAL_MARK
        with said_plainly(mark):
            replace_file(mark, json.dumps({"number": number}) + "\n")

    def _look(self) -> Start:
        """Find where the run starts, holding the folder if there is one, so that it stays as it is found."""
        if self._run.is_dir():
            self._hold()
        return find_start(self._run, "auto" if Replay.asked() else self._config.training.resume)

    def _hold(self) -> None:
        try:
            self._lock = RunLock(self._run)
        except OSError as error:
            self._why_not = f"cannot be written to ({error.strerror})"
        else:
            self._why_not = f"is in use by {self._lock.holder}" if self._lock.holder else ""

    def _compare(self) -> list[Change]:
        if self.loaded is None:
            return []
        source = self.loaded.path.parent.parent
        changes = find_changes(source, self._config)
        is_trial = self._start.kind == "auto" and (self._run / TRIAL_MARK).exists()
        refuse(changes, source, is_over=False, is_trial=is_trial)
        return changes

    def _take(self, is_over: bool) -> str:
        if self.loaded is not None:
            refuse(self.changes, self.loaded.path.parent.parent, is_over=is_over)
        training = self._config.training
        try:
            if self._lock is None and not self._why_not:
                self._run.mkdir(parents=True, exist_ok=True)
                self._hold()
            if not self._why_not:
                make_way(self._run, self._start, training.resume)
                text = to_yaml(effective(self._config, self.changes))
                replace_file(self._run / "config.yaml", text)
        except OSError as error:
            self._why_not = f"cannot be written to ({error.strerror})"
        if self._why_not.startswith("cannot") and self.loaded is None:
            raise ConfigError(
                f"training.path is {training.path!r}, but that folder {self._why_not}. Fix: name another."
            )
        return self._why_not

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
        _num_saves[self._place] += 1
        self._num_saves = _num_saves[self._place]
        if metric is None and step == self._last_saved:
            metric = self._metric  # the same weights again: what they are worth is known
        rank_state = {"rng": capture_rng(self._device)}
        self.checkpointer.save(
            step, tensors=tensors, state=state, rank_state=rank_state, metric=metric, own_tensors=own
        )
        if self.ledger is not None:
            self.ledger.confirm(self._last_saved)  # save() has waited for the one before to be on disk
        self._last_saved, self._metric = step, metric

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
                    "%s is not shared by all ranks, so checkpoints %s. Put training.path on a file system that all "
                    "nodes share.",
                    folder,
                    "are gathered on rank 0, which needs memory for the whole of them"
                    if self._is_sharded
                    else "hold rank 0's state alone of what each rank has of its own (optimizer states with local "
                    "updates, PowerSGD's errors): runs go on from them, but not bitwise",
                )
        return is_shared

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Collective."""
        agree(self.checkpointer.wait, on=0)
        if self.ledger is not None:
            self.ledger.confirm(self._last_saved)

    def settle(self) -> None:
        """Wait until nothing is being written, also where the run has failed; an error was logged. Not collective."""
        with suppress(CheckpointError):
            self.checkpointer.wait()

    def say_what_changed(self, global_batch_size: int) -> None:
        """Log on rank 0 how this run's world differs from the one that saved the checkpoint."""
        if self.loaded is None or not self._world.is_main or self.loaded.world_size == self._world.world_size:
            return
        before, now = self.loaded.world_size, self._world.world_size
        logger.info(
            "World size changed from %d to %d: the global batch stays %d, so each rank now takes %s samples of it "
            "(before: %s); each rank's own randomness starts anew",
            *(before, now, global_batch_size, _per_rank(global_batch_size, now), _per_rank(global_batch_size, before)),
        )


def _per_rank(global_batch_size: int, world_size: int) -> str:
    size, extra = divmod(global_batch_size, world_size)
    return f"{size} or {size + 1}" if extra else str(size)
