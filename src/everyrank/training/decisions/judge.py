"""What is decided at the end of an epoch: once, on rank 0, for all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everyrank.errors import ConfigError, did_you_mean
from everyrank.runtime.agreement import agree
from everyrank.runtime.logs import get_logger
from everyrank.runtime.world import World
from everyrank.training.config import TrainerConfig

logger = get_logger("training")


@dataclass(frozen=True)
class Verdict:
    """Whether to stop, and whether this epoch is the best so far."""

    stop: bool
    improved: bool


class Judge:
    """Decides from the numbers of the whole validation set.

    Args:
        config: The whole configuration.
        world: The joined world.
        early_stopping: The early stopping, or None.

    Attributes:
        best: The best value of ``training.best_metric`` so far, or None.
    """

    def __init__(self, config: TrainerConfig, world: World, early_stopping: Any) -> None:
        self._config, self._world, self.early_stopping = config, world, early_stopping
        self.best: float | None = None

    def decide(self, epoch: int, values: Mapping[str, float], *, validated: bool) -> Verdict:
        """Return rank 0's verdict on every rank. Collective.

        Args:
            epoch: The epoch that ended.
            values: Its numbers.
            validated: Whether it was validated.

        Raises:
            ConfigError: If a metric that is to be watched is not among the numbers.
        """
        verdict = agree(lambda: self._judge(epoch, values, validated), on=0)
        if verdict.improved:
            self.best = values[self._config.training.best_metric]
        return verdict

    def _judge(self, epoch: int, values: Mapping[str, float], validated: bool) -> Verdict:
        stop = False
        watched = getattr(self.early_stopping, "metrics", ["val_loss"])
        if self.early_stopping is not None and (validated or not any(name.startswith("val_") for name in watched)):
            stop = bool(self.early_stopping(values))
            if stop:
                logger.info("Early stopping after epoch %d", epoch + 1)
        name = self._config.training.best_metric
        if name not in values and validated:
            raise ConfigError(
                f"training.best_metric is {name!r}, but the run has {', '.join(values)}.{did_you_mean(name, values)}"
            )
        value = values.get(name)
        if value is None or value != value or self._config.training.keep_best == 0:
            return Verdict(stop, improved=False)
        sign = 1 if self._config.training.best_mode == "min" else -1
        return Verdict(stop, improved=self.best is None or sign * value < sign * self.best)
