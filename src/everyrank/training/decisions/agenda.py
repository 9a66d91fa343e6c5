"""When a run validates, saves and ends: questions about counts, with the same answer on every rank."""

from __future__ import annotations

from everyrank.training.config import TrainerConfig
from everyrank.training.loop import Position


class Agenda:
    """What is due when.

    Args:
        config: The whole configuration.

    Attributes:
        stops: At each n-th step of these there is something to do.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._training, self._validation = config.training, config.validation
        every = (config.training.checkpoint_every_steps, config.validation.every_n_steps)
        self.stops = tuple(number for number in every if number is not None)

    def is_over(self, position: Position, *, epoch_is_open: bool) -> bool:
        """Return whether there is nothing more to do.

        Args:
            position: Where the run is.
            epoch_is_open: Whether steps were done of the current epoch, and it has not been concluded.
        """
        if self._training.num_steps is not None:
            return position.step >= self._training.num_steps and not epoch_is_open
        return position.epoch >= (self._training.num_epochs or 0)

    def ends_here(self, position: Position, *, epoch_is_trained: bool) -> bool:
        """Return whether the step that was done is the run's last."""
        if self._training.num_steps is not None:
            return position.step >= self._training.num_steps
        return epoch_is_trained and position.epoch + 1 == self._training.num_epochs

    def validates_at_step(self, step: int) -> bool:
        """Return whether a validation is due after this step."""
        return _is_due(step, self._validation.every_n_steps)

    def validates_after(self, position: Position) -> bool:
        """Return whether a validation is due after the current epoch."""
        by_epochs = self._validation.every_n_steps is None and _is_due(position.epoch + 1, self._validation.every)
        return by_epochs or self.ends_here(position, epoch_is_trained=True)

    def saves_at_step(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        return _is_due(step, self._training.checkpoint_every_steps)

    def saves_after(self, position: Position) -> bool:
        """Return whether a checkpoint is due after the current epoch."""
        by_epochs = _is_due(position.epoch + 1, self._training.checkpoint_at)
        return by_epochs or self.ends_here(position, epoch_is_trained=True)


def _is_due(count: int, every: int | None) -> bool:
    return every is not None and count % every == 0
