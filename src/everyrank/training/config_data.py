"""The sections for data, evaluation and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from everyrank.config.resolve import import_object
from everyrank.config.schema import Bool, Int, ObjectRef, field, section
from everyrank.errors import ConfigError


@section
class DataConfig:
    """The dataset that ``prepare_dataloaders()`` without arguments builds and splits."""

    type: ObjectRef = field(doc="The dataset's class, or a function that returns a dataset.")
    args: list[Any] = field(factory=list, doc="Positional arguments of the dataset.")
    kwargs: dict[str, Any] = field(factory=dict, doc="Keyword arguments of the dataset.")
    split: list[float] = field(
        factory=lambda: [0.8, 0.1, 0.1],
        min_length=3,
        max_length=3,
        doc="Fractions of training, validation and test samples; they sum to 1. The split is drawn from "
        "`training.seed`, the same on every rank.",
    )


def _metric_type(value: Any) -> Any:
    """Return a torchmetrics class by its bare name, or any object by its full one."""
    if callable(value):
        return value
    if not isinstance(value, str):
        raise ValueError(f"found {value!r}, but it must be a torchmetrics name, or a class or function.")
    path = value if "." in value else f"torchmetrics.{value}"
    if "." not in value:
        for module in ("torchmetrics.classification", "torchmetrics.regression"):
            try:
                return import_object(f"{module}.{value}")
            except ConfigError:
                continue  # the last place, below, gives the message with the nearest name
    try:
        return import_object(path)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _metric(value: Any) -> Any:
    return value if isinstance(value, Mapping | MetricConfig) else {"type": value}


@section
class MetricConfig:
    """A metric beside the loss; ``name: type`` is short for ``name: {type: type}``."""

    type: Annotated[Any, pydantic.BeforeValidator(_metric_type), "metric"] = field(
        doc="A torchmetrics name (`MulticlassAccuracy`), a torchmetrics class, or a function `(output, data)` that "
        "returns the mean of the metric over the samples of the batch."
    )
    kwargs: dict[str, Any] = field(factory=dict, doc="Keyword arguments of a torchmetrics class.")
    select: ObjectRef | None = field(
        default=None,
        doc="A function `(output, data)` that returns the predictions and targets a torchmetrics class is given. "
        "Default: the output, and the batch's `y`, second element, or key `y`, `target` or `label`.",
    )


Metrics = dict[str, Annotated[MetricConfig, pydantic.BeforeValidator(_metric)]]


@section
class EvaluatorConfig:
    """The object that evaluates."""

    type: ObjectRef | None = field(
        default=None, doc="A subclass of `DefaultValidator` (for testing: `DefaultTester`); null is that class itself."
    )
    args: list[Any] = field(factory=list, doc="Further positional arguments of the class.")
    kwargs: dict[str, Any] = field(factory=dict, doc="Further keyword arguments of the class.")
    device: str | None = field(
        default=None,
        doc="Where to evaluate: `cpu`, `cuda`, ...; on another device than training a copy of the model is used.",
    )


@section
class LoaderConfig:
    """What the sections ``training``, ``validation`` and ``testing`` say of a loader."""

    num_workers: Int = field(default=0, ge=0, doc="Loader processes per rank.")
    pin_memory: Bool | None = field(
        default=None,
        doc="Load into page-locked memory, from which copies to a GPU run beside its work; null: if the batches go to "
        "a GPU. Elsewhere it has no effect.",
    )
    drop_last: Bool = field(
        default=False, doc="Leave out the last global batch if it is short; otherwise each sample counts."
    )
    prefetch_factor: Int | None = field(
        default=None, ge=1, doc="Batches each loader process reads ahead; null is PyTorch's 2."
    )


@section
class ValidationConfig(LoaderConfig):
    """Validation after an epoch."""

    batch_size: Int | None = field(default=None, ge=1, doc="Samples per rank and batch; null is `training.batch_size`.")
    every: Int = field(default=1, ge=1, doc="Validate after every n-th epoch (and the last).")
    every_n_steps: Int | None = field(
        default=None, ge=1, doc="Validate after every n-th optimizer step, and at the end, instead of after epochs."
    )
    on: Literal["all", "rank0"] = field(
        default="all",
        doc="`all`: every rank takes its share, sums are added. `rank0`: rank 0 does all of it, the others wait.",
    )
    metrics: Metrics = field(factory=dict, doc="Metrics beside the loss, by the name they are reported under.")
    validator: EvaluatorConfig = field(factory=lambda: EvaluatorConfig(), doc="The validator.")


@section
class TestingConfig(LoaderConfig):
    """The test after training."""

    __test__ = False  # pytest would take it for a test class

    batch_size: Int | None = field(default=None, ge=1, doc="Samples per rank and batch; null is `training.batch_size`.")
    on: Literal["rank0", "all"] | None = field(
        default=None,
        doc="`rank0`: rank 0 evaluates everything, alone; other ranks need not be there, and get its result if they "
        "call `run_test` too. `all`: every rank takes its share, and every rank must call it. null is `rank0`, or "
        "`all` with `parallel.strategy: fsdp2`, where no rank holds the whole model.",
    )
    metrics: Metrics = field(factory=dict, doc="Metrics beside the loss; if empty, those of `validation`.")
    tester: EvaluatorConfig = field(factory=lambda: EvaluatorConfig(), doc="The tester.")


@section
class EarlyStoppingConfig:
    """When to stop before ``num_epochs``."""

    type: ObjectRef = field(
        factory=lambda: import_object("everyrank.DefaultEarlyStopping"),
        doc="`DefaultEarlyStopping`, or a class with `__call__(metrics) -> bool`, `state_dict` and `load_state_dict`.",
    )
    args: list[Any] = field(factory=list, doc="Positional arguments.")
    kwargs: dict[str, Any] = field(
        factory=dict, doc="`patience`, `delta`, `window`, `metric`, `mode`, `grace_period`, `combine`."
    )
