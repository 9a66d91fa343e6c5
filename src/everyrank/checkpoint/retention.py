"""Which checkpoints are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everyrank.checkpoint.folder import CheckpointInfo, delete, list_checkpoints
from everyrank.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

_MODES = ("min", "max")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Keeps a checkpoint if any of its three rules does.

    Attributes:
        keep_last: Keep this many of the newest, at least 1; None keeps all.
        keep_best: Keep this many of those with the best metric, the newer first among equals.
        keep_every: Keep those whose step is a multiple of this; 0 for none.
        metric_mode: ``"min"`` if a smaller metric is better, ``"max"`` if a larger one is.
    """

    keep_last: int | None = 3
    keep_best: int = 1
    keep_every: int = 0
    metric_mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigError(
                f"keep_last={self.keep_last} was set, but at least one checkpoint must be kept to resume from. "
                "Set keep_last to 1 or more, or to null (None) to keep all."
            )
        for name in ("keep_best", "keep_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} was set; it cannot be negative. Set 0 to keep none.")
        if self.metric_mode not in _MODES:
            raise ConfigError(
                f"metric_mode={self.metric_mode!r} was set; it must be 'min' or 'max'."
                + did_you_mean(self.metric_mode, _MODES)
            )

    def best(self, checkpoints: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Return those that have a metric (other than NaN), best first, the newer first among equals."""
        ranked = [info for info in checkpoints if info.metric is not None and not math.isnan(info.metric)]
        sign = 1 if self.metric_mode == "min" else -1
        return sorted(ranked, key=lambda info: (sign * (info.metric or 0.0), -info.step))

    def superfluous(self, checkpoints: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Return the checkpoints that no rule keeps, of all of them, oldest first."""
        if self.keep_last is None:
            return []
        readable = [info for info in checkpoints if info.verified is not False]
        kept = {info.path for info in readable[-self.keep_last :]}
        kept.update(info.path for info in self.best(readable)[: self.keep_best])
        if self.keep_every:
            kept.update(info.path for info in readable if info.step % self.keep_every == 0)
        return [info for info in readable if info.path not in kept]

    def apply(self, folder: Path) -> None:
        """Delete the checkpoints of a folder that no rule keeps. Damaged ones are left for a person to look at."""
        for info in self.superfluous(list_checkpoints(folder, verify=False)):
            try:
                delete(info.path)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", info.path, error)
