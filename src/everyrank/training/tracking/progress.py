"""What a person sees while a run trains: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal

from everyrank.runtime.logs import get_logger

logger = get_logger("training")

_PLAIN_EVERY_S = 10.0


class Progress:
    """Shows epoch, step, loss, samples per second (per rank and in total) and the time left. Rank 0 has one.

    Args:
        mode: ``live``, ``plain``, ``off``, or ``auto``: live if standard error is a terminal.
        num_epochs: Number of epochs of the run; None if it ends after a number of steps.
        steps_per_epoch: Optimizer steps of an epoch.
        samples_per_step: Samples of a global batch (of all that one optimizer step takes).
        world_size: Number of ranks.
        first_step: The step the run goes on from.
        num_steps: Number of optimizer steps of the run, where that is what ends it.
    """

    def __init__(
        self,
        mode: Literal["auto", "live", "plain", "off"],
        *,
        num_epochs: int | None,
        steps_per_epoch: int,
        samples_per_step: int,
        world_size: int,
        first_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        self.mode = ("live" if sys.stderr.isatty() else "plain") if mode == "auto" else mode
        self._total = num_steps if num_steps is not None else (num_epochs or 0) * steps_per_epoch
        self._num_epochs = num_epochs if num_epochs is not None else -(-self._total // steps_per_epoch)
        self._steps_per_epoch = steps_per_epoch
        self._samples_per_step, self._world_size = samples_per_step, world_size
        self._first_step, self._started, self._last_line = first_step, time.monotonic(), time.monotonic()
        self._live: Any = None
        self._task: Any = None

    def start(self) -> None:
        """Begin to show."""
        self._started = self._last_line = time.monotonic()
        if self.mode == "live":
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live

            self._live = Live(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._live.add_task("training", total=self._total, completed=self._first_step, status="")
            self._live.start()

    def update(self, epoch: int, step: int, loss: float) -> None:
        """Show where the run is; plain lines come at most every ten seconds."""
        now = time.monotonic()
        if self.mode == "off" or (self.mode == "plain" and now - self._last_line < _PLAIN_EVERY_S):
            return
        self._last_line = now
        status = self._status(step, loss, now)
        name = f"epoch {epoch + 1}/{self._num_epochs}"
        if self._live is not None:
            self._live.update(self._task, completed=step, description=name, status=status)
        else:
            in_epoch = step - epoch * self._steps_per_epoch
            logger.info("%s, step %d/%d: %s", name, in_epoch, self._steps_per_epoch, status)

    def stop(self) -> None:
        """End the display."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _status(self, step: int, loss: float, now: float) -> str:
        rate = (step - self._first_step) / max(now - self._started, 1e-9)
        samples = rate * self._samples_per_step
        left = (self._total - step) / rate if rate > 0 else 0.0
        return (
            f"step {step:,}, loss {loss:.4g}, {samples:,.0f} samples/s ({samples / self._world_size:,.0f} per rank), "
            f"{format_seconds(left)} left"
        )


def format_seconds(seconds: float) -> str:
    """Return a duration as ``12 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
