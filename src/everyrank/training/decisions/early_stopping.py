"""When to stop before the last epoch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from everyrank.errors import ConfigError, did_you_mean


class DefaultEarlyStopping:
    """Stops when the watched metrics have not improved for ``patience`` epochs.

    The trainer calls it on rank 0 with the numbers of the whole validation set (never one rank's shard) and broadcasts
    its decision.

    Args:
        patience: Number of evaluations without improvement that are borne.
        delta: An improvement smaller than this does not count.
        window: Compare the moving mean of this many evaluations.
        metric: Name, or several names, of the values to watch: ``val_loss``, ``train_loss``, ``val_<metric>``.
        mode: ``"min"`` or ``"max"``: which is better; one for all metrics or one for each.
        grace_period: Number of evaluations at the start that never stop the run.
        combine: With several metrics, stop when ``"any"`` or ``"all"`` of them have run out of patience.

    Raises:
        ConfigError: If a value is out of range.
    """

    def __init__(
        self,
        patience: int = 5,
        delta: float = 0.0,
        window: int = 1,
        metric: str | Sequence[str] = "val_loss",
        mode: Literal["min", "max"] | Sequence[str] = "min",
        grace_period: int = 0,
        combine: Literal["any", "all"] = "any",
    ) -> None:
        self.patience, self.delta, self.window = patience, delta, window
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        self.modes = [mode] * len(self.metrics) if isinstance(mode, str) else list(mode)
        self.grace_period, self.combine = grace_period, combine
        self._check()
        self.num_evaluations = 0
        self.best = {name: -math.inf if m == "max" else math.inf for name, m in self._watched()}
        self.num_bad = dict.fromkeys(self.metrics, 0)
        self._recent = {name: deque[float](maxlen=window) for name in self.metrics}

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Take in the values of one evaluation and tell whether to stop.

        Args:
            metrics: Values by name.

        Raises:
            ConfigError: If a watched metric is not among them.
        """
        self.num_evaluations += 1
        for name, mode in self._watched():
            if name not in metrics:
                raise ConfigError(
                    f"early_stopping watches the metric {name!r}, but the run has {', '.join(sorted(metrics))}."
                    f"{did_you_mean(name, metrics)}"
                )
            self._recent[name].append(float(metrics[name]))
            mean = sum(self._recent[name]) / len(self._recent[name])
            gain = mean - self.best[name] if mode == "max" else self.best[name] - mean
            if gain > self.delta or (math.isinf(self.best[name]) and math.isfinite(mean)):
                self.best[name], self.num_bad[name] = mean, 0
            else:
                self.num_bad[name] += 1
        if self.num_evaluations <= self.grace_period:
            self.num_bad = dict.fromkeys(self.metrics, 0)
            return False
        spent = [self.num_bad[name] >= self.patience for name in self.metrics]
        return any(spent) if self.combine == "any" else all(spent)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "num_evaluations": self.num_evaluations,
            "best": dict(self.best),
            "num_bad": dict(self.num_bad),
            "recent": {name: list(values) for name, values in self._recent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; a metric that was not watched then starts anew."""
        self.num_evaluations = int(state["num_evaluations"])
        for name in self.metrics:
            if name in state["best"]:
                self.best[name] = float(state["best"][name])
                self.num_bad[name] = int(state["num_bad"][name])
                self._recent[name] = deque(state["recent"][name], maxlen=self.window)

    def _watched(self) -> list[tuple[str, str]]:
        return list(zip(self.metrics, self.modes, strict=True))

    def _check(self) -> None:
        for name, least in (("patience", 1), ("window", 1), ("grace_period", 0), ("delta", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"early_stopping.{name}={getattr(self, name)} was set; it must be at least {least}.")
        if not self.metrics or len(self.modes) != len(self.metrics):
            raise ConfigError(
                f"early_stopping has {len(self.metrics)} metrics and {len(self.modes)} modes. Give one metric or more, "
                "and one mode for all or one for each."
            )
        for name, value, allowed in (
            *(("mode", mode, ("min", "max")) for mode in self.modes),
            ("combine", self.combine, ("any", "all")),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"early_stopping.{name}={value!r} was set; it must be {' or '.join(map(repr, allowed))}."
                    f"{did_you_mean(value, allowed)}"
                )
