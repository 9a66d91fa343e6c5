"""Weights from files: published ones, legacy checkpoints, safetensors. Nothing in a file is executed."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everyrank import ConfigError

logger = logging.getLogger(__name__)

# What torch.load raises on files that are damaged, cut short, or no checkpoints at all.
LOAD_ERRORS = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError)


def read_file(path: str | Path) -> Any:
    """Return the content of a ``.pth`` or ``.safetensors`` file, on the CPU.

    Raises:
        ConfigError: It is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"the weights {path} do not exist: set the path to a .pth or .safetensors file, or to null")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"the weights {path} cannot be read: the file is damaged, or holds more than tensors, and "
            f"loading that would run code from it ({str(error).splitlines()[0]}). Save its state_dict() alone"
        ) from error
    except LOAD_ERRORS as error:
        raise ConfigError(f"the weights {path} cannot be read ({error}): the file is damaged, get it again") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file, which may stand under ``params_ema``, ``params`` or ``state_dict``."""
    content = read_file(path)
    for key in ("params_ema", "params", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ConfigError(f"the weights {path} hold no dict of tensors, also not under 'params' or 'params_ema'")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_weights(
    module: nn.Module, path: str | Path, *, strict: bool = True, may_lack: Collection[str] = ("mean", "std")
) -> None:
    """Load a file's weights into ``module``.

    Args:
        module: The network.
        path: The file.
        strict: Refuse the file unless names and shapes are the same; otherwise load what fits and log the rest.
        may_lack: Names that may be missing in any case (constants that older files do not have).

    Raises:
        ConfigError: The weights do not fit; it lists the keys.
    """
    weights, own = read_weights(path), module.state_dict()
    problems = [f"{name} is missing in the file" for name in own if name not in weights and name not in may_lack]
    problems += [f"{name} is unknown to the network" for name in weights if name not in own]
    fitting = {}
    for name, value in weights.items():
        if name in own and own[name].shape == value.shape:
            fitting[name] = value
        elif name in own:
            problems.append(f"{name} is {tuple(value.shape)} in the file and {tuple(own[name].shape)} in the network")
    if problems:
        more = [f"... and {len(problems) - 12} more"] if len(problems) > 12 else []
        message = f"the weights {path} do not fit the network that the options describe:"
        if strict:
            hint = "Use the netG section that the weights were trained with, or set G_param_strict to false."
            raise ConfigError(message, [*problems[:12], *more, hint])
        logger.warning("%s %s", message, "; ".join([*problems[:12], *more]))
    module.load_state_dict(fitting, strict=False)
