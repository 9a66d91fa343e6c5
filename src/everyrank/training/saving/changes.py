"""What becomes of settings that differ from those a run was started with, key by key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from everyrank.config.yaml_loader import Named, names_of, read_names
from everyrank.errors import ConfigError
from everyrank.training.config import TrainerConfig, plain_config


class Fate(Enum):
    """What is done about a changed setting."""

    FREE = "applied"
    TRAINS = "applied to what is left to train; refused where the run is complete"
    KEPT = "kept as the run has it"
    REFUSED = "refused"


# The longest key that fits decides.
RULES: Mapping[str, Fate] = {
    "criterion": Fate.TRAINS,
    "apply_model": Fate.TRAINS,
    "model": Fate.TRAINS,
    "training": Fate.FREE,
    "training.batch_size": Fate.KEPT,
    "training.global_batch_size": Fate.KEPT,
    "training.accumulation_steps": Fate.TRAINS,
    "training.seed": Fate.REFUSED,
    "training.dtype": Fate.TRAINS,
    "training.mixed_precision": Fate.TRAINS,
    "training.tf32": Fate.TRAINS,
    "training.optimizer_type": Fate.REFUSED,
    "training.optimizer_args": Fate.REFUSED,
    "training.optimizer_kwargs": Fate.TRAINS,
    "training.parameter_groups": Fate.REFUSED,
    "training.frozen": Fate.TRAINS,
    "training.scheduler": Fate.REFUSED,
    "training.clip_grad_norm": Fate.TRAINS,
    "training.clip_grad_value": Fate.TRAINS,
    "training.ema": Fate.TRAINS,
    "training.ema.evaluate": Fate.FREE,
    "training.shuffle": Fate.REFUSED,
    "training.drop_last": Fate.REFUSED,
    "validation": Fate.FREE,
    "testing": Fate.FREE,
    "early_stopping": Fate.FREE,
    "data": Fate.TRAINS,
    "data.split": Fate.REFUSED,
    "parallel": Fate.FREE,
    "parallel.comm_hook": Fate.TRAINS,
    "parallel.sync_batchnorm": Fate.TRAINS,
    "parallel.local_updates": Fate.TRAINS,
}
OF_THE_RATE = "training.optimizer_kwargs.lr"
_NOT_COMPARED = ("training.path", "training.resume", "parallel.rank", "parallel.world_size")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Change:
    """A setting that differs.

    Attributes:
        key: Its full key.
        old: What the run has; None also where it was not set.
        new: What is configured now.
        fate: What is done about it.
    """

    key: str
    old: Any
    new: Any
    fate: Fate

    def __str__(self) -> str:
        return f"{self.key}: the run has {_shown(self.old)}, configured is {_shown(self.new)}"


def find_changes(run: Path, config: TrainerConfig) -> list[Change]:
    """Return what differs between a run's ``config.yaml`` and ``config``; nothing if the file is missing."""
    if not (run / "config.yaml").is_file():
        return []
    old, new = dict(_flat(read_names(run / "config.yaml"))), dict(_flat(names_of(plain_config(config))))
    found = []
    for key in {**old, **new}:
        if key.startswith(_NOT_COMPARED) or _same(old.get(key), new.get(key)):
            continue
        fate = fate_of(key)
        if key == OF_THE_RATE and config.training.scheduler is not None:
            fate = Fate.REFUSED
        found.append(Change(key, old.get(key), new.get(key), fate))
    return found


def fate_of(key: str) -> Fate:
    """Return what is done about a change of ``key``."""
    parts = key.split(".")
    return next(RULES[name] for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in RULES)


def refuse(changes: list[Change], run: Path, *, is_over: bool, is_trial: bool = False) -> None:
    """Raise where a change cannot be followed.

    Args:
        changes: All changes.
        run: The run's folder.
        is_over: Whether nothing is left to train.
        is_trial: Whether the run is of one trial of a study, which has measured one set of settings.

    Raises:
        ConfigError: It lists every such setting.
    """
    fates = (Fate.REFUSED, Fate.TRAINS) if is_over else (Fate.REFUSED,)
    wrong = [str(change) for change in changes if change.fate in fates]
    if is_trial and (of_trial := [str(change) for change in changes if change.fate is not Fate.FREE]):
        raise ConfigError(
            f"The run in {run} is a trial's with other settings: another trial would go on from its weights. "
            'Fix: give each trial a training.path of its own, for example f"runs/trial-{trial.number}".',
            of_trial,
        )
    if wrong:
        why = "is complete, and was trained with" if is_over else "goes on from a checkpoint made with"
        raise ConfigError(
            f"The run in {run} {why} other settings. Fix: set them as the run has them, name another training.path, or "
            "start anew with training.resume: never.",
            wrong,
        )


def effective(config: TrainerConfig, changes: list[Change]) -> dict[str, Any]:
    """Return the configuration that the run really has: settings that are kept are the old ones."""
    values = plain_config(config)
    for change in changes:
        if change.fate is Fate.KEPT:
            section, _, key = change.key.rpartition(".")
            values[section][key] = change.old
    return values


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what each parameter group has besides parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def apply_changes(changes: list[Change], optimizer: torch.optim.Optimizer, configured: list[dict[str, Any]]) -> None:
    """Give an optimizer whose state was loaded the changed hyperparameters.

    Args:
        changes: All changes.
        optimizer: The optimizer.
        configured: Its ``hyperparameters`` before the state was loaded.
    """
    parts = [change.key.split(".") for change in changes if change.fate is Fate.TRAINS]
    keys = {part[2] for part in parts if part[:2] == ["training", "optimizer_kwargs"] and len(part) > 2}
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update({key: values[key] for key in keys if key in values})


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _same(old: Any, new: Any) -> bool:
    if old == new or (old in (None, {}, []) and new in (None, {}, [])):
        return True
    if not (isinstance(old, Named) and isinstance(new, Named)):
        return False
    names = [_ADDRESS.sub("", value.path) for value in (old, new)]
    if names[0] == names[1]:  # objects without a name: all that can be compared is how they look
        return True
    # The script that runs is __main__; imported by another, it has a name.
    return any(name.startswith("__main__.") for name in names) and len({n.rpartition(".")[2] for n in names}) == 1


def _shown(value: Any) -> str:
    return value.path if isinstance(value, Named) else "null" if value is None else repr(value)
