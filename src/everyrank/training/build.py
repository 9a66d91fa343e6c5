"""Making the parts of a training run from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from everyrank.config.resolve import construct
from everyrank.errors import ConfigError
from everyrank.runtime.world import World
from everyrank.training.batch import place_criterion
from everyrank.training.config import SchedulerConfig, TrainerConfig, TrainingConfig
from everyrank.training.config_data import EvaluatorConfig
from everyrank.training.decisions.early_stopping import DefaultEarlyStopping
from everyrank.training.ema import WeightAverage
from everyrank.training.evaluation.evaluators import DefaultTester, DefaultValidator
from everyrank.training.hardware.compiling import CompileConfig, compile_model
from everyrank.training.hardware.kernels import fused_if_possible
from everyrank.training.parallel.local_updates import make_local_updates
from everyrank.training.parallel.wrapping import powersgd_of, prepare_module, wrap
from everyrank.training.parameter_groups import Frozen, optimizer_groups
from everyrank.training.parts import Parts
from everyrank.training.placement import resolve_device
from everyrank.training.seeding import seed_everywhere
from everyrank.training.step import AUTOCAST, DTYPES

E = TypeVar("E", bound=DefaultValidator)


def build_parts(config: TrainerConfig, world: World, device: torch.device) -> Parts:
    """Return the parts of a run, alike on every rank. Collective where there are several.

    Raises:
        ConfigError: A part cannot be made as configured, or does not fit the device.
    """
    training = config.training
    module = build_model(config, world, device)
    model = wrap(module, config.parallel, world, device)
    optimizer = build_optimizer(module, training)
    ema = WeightAverage(module, training.ema) if training.ema else None
    return Parts(
        module=module,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, training.scheduler),
        steps_scheduler=training.scheduler is not None and training.scheduler.interval == "step",
        scaler=torch.amp.GradScaler(device.type) if training.mixed_precision == "fp16" else None,
        ema=ema,
        powersgd=powersgd_of(model),
        local=make_local_updates(module, config.parallel, world, ema),
        frozen=Frozen(module, training.frozen) if training.frozen else None,
    )


def build_model(config: TrainerConfig, world: World, device: torch.device) -> nn.Module:
    """Return the bare model on its device, with the same initial weights on every rank.

    One that FSDP2 will shard stays on the CPU, so that only its blocks are ever whole on the device, one by one.

    Raises:
        ConfigError: If the class refuses its arguments.
    """
    seed_everywhere(config.training.seed)
    try:
        module = config.model.build()
    except TypeError as error:
        raise ConfigError(
            f"model: {getattr(config.model.type, '__name__', config.model.type)} refused: {error}."
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"model.type gave a {type(module).__name__}; it must give a torch.nn.Module.")
    dtype = DTYPES[config.training.dtype]
    module = module.to(device=None if config.is_sharded else device, dtype=dtype)
    if config.training.channels_last:
        _put_channels_last(module)
    module = prepare_module(module, config.parallel, world, device)
    if config.training.compile:
        options = config.training.compile
        compile_model(module, options if isinstance(options, CompileConfig) else CompileConfig())
    return module


def _put_channels_last(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the model's trainable parameters.

    Raises:
        ConfigError: If there are none, or the class refuses its arguments.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(
            f"The model ({type(module).__name__}) has no trainable parameters, so there is nothing to train."
        )
    kind, args, kwargs = config.optimizer_type, config.optimizer_args, config.optimizer_kwargs
    groups = optimizer_groups(module, config.parameter_groups)
    kwargs = {**fused_if_possible(kind, config, module), **kwargs}
    return construct("training.optimizer_type", kind, groups, *args, **kwargs)


def build_scheduler(optimizer: torch.optim.Optimizer, config: SchedulerConfig | None) -> Any:
    """Return the learning-rate scheduler, or None.

    Raises:
        ConfigError: If the class refuses its arguments.
    """
    if config is None:
        return None
    return construct("training.scheduler.type", config.type, optimizer, *config.args, **config.kwargs)


def build_early_stopping(config: TrainerConfig) -> Any:
    """Return the early stopping, or None.

    Raises:
        ConfigError: If the class refuses its arguments.
    """
    section = config.early_stopping
    if section is None:
        return None
    try:
        return section.type(*section.args, **section.kwargs)
    except TypeError as error:
        takes = "patience, delta, window, metric, mode, grace_period, combine"
        hint = f" It takes: {takes}." if section.type is DefaultEarlyStopping else ""
        raise ConfigError(f"early_stopping refused its arguments: {error}.{hint}") from error


def build_validator(config: TrainerConfig, world: World, device: torch.device) -> DefaultValidator:
    """Return the validator.

    Raises:
        ConfigError: If its class is no DefaultValidator, or its device does not exist.
    """
    section = config.validation
    key = "validation.validator"
    return _build_evaluator(
        DefaultValidator, section.validator, section.metrics, section.on, key, config, world, device
    )


def build_tester(config: TrainerConfig, world: World, device: torch.device) -> DefaultTester:
    """Return the tester.

    Raises:
        ConfigError: If its class is no DefaultTester, or its device does not exist.
    """
    metrics = config.testing.metrics or config.validation.metrics
    section = config.testing.tester
    return _build_evaluator(DefaultTester, section, metrics, config.test_on, "testing.tester", config, world, device)


def _build_evaluator(
    default: type[E],
    given: EvaluatorConfig,
    metrics: Mapping[str, Any],
    on: Literal["all", "rank0"],
    key: str,
    config: TrainerConfig,
    world: World,
    device: torch.device,
) -> E:
    kind = given.type if given.type is not None else default
    if not (isinstance(kind, type) and issubclass(kind, default)):
        raise ConfigError(f"{key}.type is {kind!r}; it must be a subclass of {default.__name__}.")
    where = device if given.device is None else resolve_device(given.device, world, f"{key}.device")
    return kind(
        make_criterion(config, device),
        where,
        *given.args,
        world=world,
        apply_model=config.apply_model,
        metrics=metrics,
        on=on,
        dtype=DTYPES[config.training.dtype],
        autocast=AUTOCAST[config.training.mixed_precision],
        channels_last=config.training.channels_last,
        **given.kwargs,
    )


def make_criterion(config: TrainerConfig, device: torch.device) -> Any:
    """Return the criterion, a module's buffers and parameters on the device; a class is made an object first.

    Raises:
        ConfigError: If the class needs arguments.
    """
    criterion = config.criterion
    if isinstance(criterion, type):
        try:
            criterion = criterion()
        except TypeError as error:
            raise ConfigError(
                f"criterion is the class {criterion.__name__}, which cannot be made without arguments ({error}). "
                "Give a function (output, data) that returns the mean loss."
            ) from error
    return place_criterion(criterion, device, DTYPES[config.training.dtype], in_place=True)
