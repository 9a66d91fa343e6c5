"""Experiment trackers behind one small interface of three methods."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from everyrank.errors import ConfigError
from everyrank.training.config import TrackingConfig


class Sink(Protocol):
    """Where a run's numbers go. Only rank 0 has sinks."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin a run with this configuration (plain values)."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at an optimizer step."""
        ...

    def close(self) -> None:
        """End the run."""
        ...


class TensorBoardSink:
    """Writes TensorBoard events.

    Args:
        folder: The folder of the events.
        purge_step: On resume: hide what an earlier process recorded from this step on.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def start(self, config: Mapping[str, Any]) -> None:
        """Record the configuration as text."""
        from everyrank.config.yaml_loader import to_yaml

        text = "\n".join("    " + line for line in to_yaml(config).splitlines())
        self._writer.add_text("config", text)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class WandbSink:
    """Sends numbers to Weights & Biases.

    Args:
        options: Arguments of ``wandb.init``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._wandb = _require("wandb", "training.tracking.wandb")
        self._options = dict(options)

    def start(self, config: Mapping[str, Any]) -> None:
        """Call ``wandb.init``."""
        self._run = self._wandb.init(config=_printable(config), **self._options)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflowSink:
    """Sends numbers to MLflow.

    Args:
        options: Arguments of ``mlflow.start_run``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._mlflow = _require("mlflow", "training.tracking.mlflow")
        self._options = dict(options)

    def start(self, config: Mapping[str, Any]) -> None:
        """Start the run and record the configuration."""
        self._mlflow.start_run(**self._options)
        self._mlflow.log_dict(_printable(config), "config.json")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers."""
        self._mlflow.log_metrics({key: float(value) for key, value in values.items()}, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def make_sinks(config: TrackingConfig, run: Path, first_step: int) -> list[Sink]:
    """Return the sinks that are configured; rank 0 calls it.

    Args:
        config: The ``training.tracking`` section.
        run: The run's folder.
        first_step: The step the run starts or goes on from.

    Raises:
        ConfigError: If a tracker that was asked for is not installed.
    """
    sinks: list[Sink] = []
    installed = importlib.util.find_spec("tensorboard") is not None
    if config.tensorboard or (config.tensorboard is None and installed):
        _require("tensorboard", "training.tracking.tensorboard")
        sinks.append(TensorBoardSink(run / "tensorboard", purge_step=first_step + 1 if first_step else None))
    if config.wandb is not None:
        sinks.append(WandbSink(config.wandb))
    if config.mlflow is not None:
        sinks.append(MLflowSink(config.mlflow))
    return sinks + [sink() for sink in config.sinks]


def _require(package: str, key: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{key} is set, but {package} is not installed. pip install {package}, or unset it."
        ) from error


def _printable(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {str(key): _printable(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_printable(value) for value in config]
    return config if isinstance(config, str | int | float | bool | None) else repr(config)
