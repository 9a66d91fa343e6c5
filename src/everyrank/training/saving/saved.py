"""A checkpoint of a training as ``training.after_save`` is given it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from everyrank.checkpoint.encoding import unflatten_state
from everyrank.checkpoint.reading import LoadedCheckpoint, read_checkpoint


class SavedTraining:
    """What a checkpoint on the disk holds, read when it is asked for.

    Args:
        path: The checkpoint's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._loaded.step

    @cached_property
    def model(self) -> dict[str, Any]:
        """The bare model's state dict."""
        return self._state("model")

    @cached_property
    def average(self) -> dict[str, Any] | None:
        """A state dict of the averaged weights, or None if the run keeps none."""
        return {**self.model, **self._loaded.tensors["ema"]} if "ema" in self._loaded.tensors else None

    @cached_property
    def optimizer(self) -> dict[str, Any]:
        """The optimizer's state dict (with local updates, rank 0's)."""
        return self._state("optimizer")

    @cached_property
    def _loaded(self) -> LoadedCheckpoint:
        return read_checkpoint(self.path)

    def _state(self, name: str) -> dict[str, Any]:
        state = unflatten_state(self._loaded.tensors.get(name, {}), self._loaded.state[name])
        assert isinstance(state, dict)
        return state
