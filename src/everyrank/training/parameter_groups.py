"""Parameters by name: groups with optimizer settings of their own, and parts that are frozen at first."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from everyrank.config.schema import Int, ObjectRef, field, section
from everyrank.errors import ConfigError, did_you_mean


@section
class ParametersConfig:
    """Some of a model's parameters."""

    match: list[str] = field(
        factory=list,
        doc="Names of modules or parameters, with `*` and `?` as in file names: `encoder`, `*.norm?.weight`. A module "
        "stands for all the parameters in it.",
    )
    select: ObjectRef | None = field(
        default=None, doc="Instead of `match`: a function `(name, parameter)` that tells whether a parameter is meant."
    )


@section
class ParameterGroupConfig(ParametersConfig):
    """Parameters with optimizer settings of their own."""

    optimizer_kwargs: dict[str, Any] = field(factory=dict, doc="What differs from `training.optimizer_kwargs`.")


@section
class FrozenConfig(ParametersConfig):
    """A part that is not trained at first."""

    until_step: Int = field(ge=1, doc="Number of optimizer steps of the run that leave it as it is.")


def chosen(module: nn.Module, config: ParametersConfig, key: str) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that a section names.

    Args:
        module: The bare model.
        config: The section.
        key: Where it stands, for messages.

    Raises:
        ConfigError: If it names none, or a pattern fits none.
    """
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if bool(config.match) == (config.select is not None):
        raise ConfigError(f"{key}: give either match (patterns of names) or select (a function).")
    if config.select is not None:
        found = {name: parameter for name, parameter in named.items() if config.select(name, parameter)}
        if not found:
            raise ConfigError(f"{key}.select: the function chose none of the {len(named)} trainable parameters.")
        return found
    for pattern in config.match:
        if not any(_fits(name, pattern) for name in named):
            parts = sorted({part for name in named for part in (name, *name.split(".")) if not part.isdigit()})
            hint = did_you_mean(pattern.strip("*."), parts)
            raise ConfigError(f"{key}.match: no trainable parameter's name fits {pattern!r}.{hint}")
    return {name: p for name, p in named.items() if any(_fits(name, pattern) for pattern in config.match)}


def optimizer_groups(module: nn.Module, configs: Sequence[ParameterGroupConfig]) -> list[Any]:
    """Return what an optimizer takes: the trainable parameters, in groups where there are any configured.

    Raises:
        ConfigError: If a group names no parameter.
    """
    rest = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not configs:
        return list(rest.values())
    groups = []
    for number, config in enumerate(configs):
        names = [name for name in chosen(module, config, f"training.parameter_groups.{number}") if name in rest]
        groups.append({"params": [rest.pop(name) for name in names], **config.optimizer_kwargs})
    return [{"params": list(rest.values())}, *groups]


class Frozen:
    """Drops the gradients of parts that are frozen.

    Args:
        module: The bare model.
        configs: The parts.

    Attributes:
        num_steps: Optimizer steps of the run so far.

    Raises:
        ConfigError: If a part names no parameter.
    """

    def __init__(self, module: nn.Module, configs: Sequence[FrozenConfig]) -> None:
        self.num_steps = 0
        self._parts = [
            (config.until_step, list(chosen(module, config, f"training.frozen.{number}").values()))
            for number, config in enumerate(configs)
        ]

    def drop_gradients(self) -> bool:
        """Drop the gradients of one more optimizer step that do not count; return whether any part is still frozen."""
        self.num_steps += 1
        self._parts = [part for part in self._parts if self.num_steps <= part[0]]
        for _, parameters in self._parts:
            for parameter in parameters:
                parameter.grad = None
        return bool(self._parts)


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
