"""Everything that watches a run on rank 0: progress, trackers and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from everyrank.data.sampler import GlobalBatchSampler
from everyrank.runtime.logs import get_logger
from everyrank.runtime.world import World
from everyrank.training.config import TrainerConfig, plain_config
from everyrank.training.loop import LossRow, Position
from everyrank.training.tracking.history import Row
from everyrank.training.tracking.plots import draw_curves
from everyrank.training.tracking.progress import Progress
from everyrank.training.tracking.trackers import Sink, make_sinks

logger = get_logger("training")


class Observers:
    """Shows and records a run; nothing on the other ranks.

    Args:
        config: The whole configuration.
        run: The run's folder.
        world: The joined world.
        sampler: Of the training data.
        first_step: The step the run starts or goes on from.
    """

    def __init__(
        self, config: TrainerConfig, run: Path, world: World, sampler: GlobalBatchSampler, first_step: int
    ) -> None:
        self._config, self._run, self._is_main, self._first_step = config, run, world.is_main, first_step
        self._sinks: list[Sink] = []
        training = config.training
        self._progress = Progress(
            training.progress,
            num_epochs=training.num_epochs,
            num_steps=training.num_steps,
            steps_per_epoch=-(-len(sampler) // training.accumulation_steps),
            samples_per_step=sampler.global_batch_size * training.accumulation_steps,
            world_size=world.world_size,
            first_step=first_step,
        )

    def __enter__(self) -> Observers:
        if self._is_main:
            self._sinks = make_sinks(self._config.training.tracking, self._run, self._first_step)
            for sink in self._sinks:
                sink.start(plain_config(self._config))
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_main:
            return
        self._progress.stop()
        for sink in self._sinks:
            self._try(sink, sink.close)
        self._sinks = []
        if self._config.training.plots:
            draw_curves(self._run / "history.jsonl", self._run / "curves.png")

    def steps(self, position: Position, rows: Sequence[LossRow]) -> None:
        """Take in the losses of recorded steps; the last has no rate and is only shown."""
        if not self._is_main:
            return
        for step, loss, lr in rows:
            if lr is not None:
                self._log({"train/loss_step": loss, "train/lr": lr}, step)
        self._progress.update(position.epoch, position.step, rows[-1][1])

    def results(self, row: Row) -> None:
        """Take in the results of an epoch or a validation."""
        if self._is_main:
            named = {"train/loss" if key == "train_loss" else key.replace("val_", "val/", 1): row[key] for key in row}
            self._log({key: value for key, value in named.items() if "/" in key}, row["step"])

    def _log(self, values: dict[str, Any], step: int) -> None:
        for sink in list(self._sinks):
            self._try(sink, lambda sink=sink: sink.log(values, step))

    def _try(self, sink: Sink, action: Any) -> None:
        """Do without a tracker that fails: a lost connection must not end a training."""
        try:
            action()
        except Exception as error:
            logger.warning("%s failed and is left out from here on: %s", type(sink).__name__, error)
            if sink in self._sinks:
                self._sinks.remove(sink)
