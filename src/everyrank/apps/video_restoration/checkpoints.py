"""Legacy checkpoints, ``models/<iter>_G.pth`` and its companions: written, found, read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everyrank import ConfigError, SavedTraining
from everyrank.apps.video_restoration.weights import read_file, read_weights

logger = logging.getLogger(__name__)
_LEGACY = re.compile(r"(\d+)_(G|E|optimizerG)\.pth")


@dataclass(frozen=True)
class LegacyCheckpoint:
    """What one iteration's legacy files hold.

    Attributes:
        iteration: Iterations done.
        network: State dict of the network.
        average: State dict of the moving average, or None.
        optimizer: State dict of the optimizer, or None.
    """

    iteration: int
    network: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Any] | None


class LegacyFiles:
    """Writes a checkpoint's ``<iter>_optimizerG.pth``, ``<iter>_E.pth`` and ``<iter>_G.pth``; ``training.after_save``.

    Args:
        folder: The folder ``models``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, saved: SavedTraining) -> None:
        """Write the files in this order; each appears whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {"optimizerG": saved.optimizer, "E": saved.average, "G": saved.model}
        for label, content in parts.items():
            if content is not None:
                path = self.folder / f"{saved.step}_{label}.pth"
                partial = path.with_name(f".{path.name}.partial")
                with partial.open("wb") as file:
                    torch.save(content, file)
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(path)
        logger.info("saved iteration %d", saved.step)


def legacy_iterations(folder: Path) -> list[int]:
    """Return the iterations that have a ``_G.pth``, newest first."""
    if not folder.is_dir():
        return []
    found = (_LEGACY.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in found if match and match[2] == "G"), reverse=True)


def newest_legacy(folder: Path, network: nn.Module, *, after: int = -1) -> LegacyCheckpoint | None:
    """Return the newest legacy checkpoint that loads into ``network``, or None; broken ones are logged by name.

    Args:
        folder: The folder ``models``.
        network: The network the weights must fit.
        after: Look only for iterations above this.
    """
    for iteration in legacy_iterations(folder):
        if iteration <= after:
            return None
        try:
            weights = read_weights(folder / f"{iteration}_G.pth")
            _check_fit(network, weights, folder / f"{iteration}_G.pth")
            average_path = folder / f"{iteration}_E.pth"
            average = read_weights(average_path) if average_path.exists() else None
            if average is not None:
                _check_fit(network, average, average_path)
            optimizer_path = folder / f"{iteration}_optimizerG.pth"
            optimizer = read_file(optimizer_path) if optimizer_path.exists() else None
        except ConfigError as error:
            logger.warning("skipping the checkpoint of iteration %d: %s", iteration, error)
            continue
        return LegacyCheckpoint(iteration, weights, average, optimizer)
    return None


def _check_fit(network: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = network.state_dict()
    wrong = sorted(set(own) ^ set(weights)) + [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if wrong:
        raise ConfigError(f"{path} does not fit the network: {', '.join(wrong[:8])}")
