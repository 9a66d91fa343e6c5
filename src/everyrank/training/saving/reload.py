"""Trained weights in one line: ``model = TrainerDDP.load_model("runs/mine")``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from everyrank.checkpoint.checkpointer import LoadedCheckpoint, read_checkpoint
from everyrank.checkpoint.folder import CheckpointInfo, describe, first_whole, list_checkpoints
from everyrank.checkpoint.retention import Retention
from everyrank.config.yaml_loader import import_names, read_names
from everyrank.errors import CheckpointError, ConfigError
from everyrank.training.config import read_model_config
from everyrank.training.saving.state import load_model_state
from everyrank.training.step import DTYPES

M = TypeVar("M", bound=nn.Module)


def load_model(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    which: Literal["last", "best"] = "last",
    average: bool | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Return a trained model, ready for inference.

    Weights are data: nothing in a checkpoint is executed. Without ``model`` the run's ``config.yaml`` says which class
    is imported and made, so that file must be trusted as a program is; a class that is no ``nn.Module``, or a function,
    is not called.

    Args:
        path: A run's folder, or one checkpoint's.
        model: The model to load into; by default it is built from the run's ``config.yaml``.
        which: Of a run: the newest checkpoint, or the best.
        average: Use the moving average of the weights; None: if the run kept one.
        device: Where the model goes.

    Raises:
        CheckpointError: If there is no whole checkpoint, or it does not fit the model.
        ConfigError: If no model is given and the configuration is missing or names objects that are not found here.
    """
    folder = find_in(Path(path), which)
    loaded = read_checkpoint(folder)
    if model is None:
        model = _build(folder)
    load_model_state(model, loaded)
    if average or (average is None and "ema" in loaded.tensors):
        _put_average(model, loaded)
    return model.to(device).eval()


def find_in(path: Path, which: Literal["last", "best"] = "last") -> Path:
    """Return the folder of a whole checkpoint: ``path`` itself, or one of the run's in ``path``.

    Raises:
        CheckpointError: If there is none.
    """
    if (path / "manifest.json").is_file():
        found = describe(path, verify=True)
        if not found.verified:
            raise CheckpointError(f"The checkpoint {path} is damaged: {found.reason}. Use an earlier one.")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    candidates = _ranked(path, list_checkpoints(folder, verify=False), which)
    whole, _ = first_whole(info.path for info in candidates)
    if whole is not None:
        return whole.path
    raise CheckpointError(f"No whole checkpoint was found in {folder}. Give a run's folder or a checkpoint's.")


def _ranked(run: Path, found: list[CheckpointInfo], which: str) -> list[CheckpointInfo]:
    if which == "last":
        return found[::-1]
    config = run / "config.yaml"
    mode: Literal["min", "max"] = "min"
    if config.is_file() and read_names(config)["training"]["best_mode"] == "max":
        mode = "max"
    return Retention(metric_mode=mode).best(found)


def _build(checkpoint: Path) -> nn.Module:
    config = checkpoint.parent.parent / "config.yaml"
    try:
        # The model's own names alone: the criterion may have been in a script that is not running now.
        values = read_names(config)
        given = read_model_config(import_names(values["model"]))
        if not (isinstance(given.type, type) and issubclass(given.type, nn.Module)):
            # A file that came from elsewhere must not choose what is called.
            raise ConfigError(f"model.type is {values['model']['type'].path}, which is no class of nn.Module.")
        model = given.build()
    except (ConfigError, KeyError) as error:
        raise ConfigError(
            f"The model cannot be built from {config}: {error} Pass it: load_model(path, model)."
        ) from error
    return model.to(dtype=DTYPES[values["training"]["dtype"]])


def _put_average(model: nn.Module, loaded: LoadedCheckpoint) -> None:
    average = loaded.tensors.get("ema")
    if average is None:
        raise CheckpointError(f"The checkpoint {loaded.path} has no averaged weights. Load it with average=False.")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in average.items():
            parameters[name].copy_(tensor)
