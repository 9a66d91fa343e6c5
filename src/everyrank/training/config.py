"""What TrainerDDP is configured by: the top level, ``training`` and ``model``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from everyrank.config.resolve import import_object
from everyrank.config.schema import Bool, Float, Int, ObjectRef, as_mapping, build, field, section
from everyrank.config.secrets import masked
from everyrank.errors import did_you_mean
from everyrank.training.config_data import (
    DataConfig,
    EarlyStoppingConfig,
    LoaderConfig,
    TestingConfig,
    ValidationConfig,
)
from everyrank.training.hardware.compiling import CompileConfig
from everyrank.training.parallel.config import ParallelConfig, against_local_updates
from everyrank.training.parameter_groups import FrozenConfig, ParameterGroupConfig


@section
class SchedulerConfig:
    """A learning-rate scheduler."""

    type: ObjectRef = field(doc="A class of `torch.optim.lr_scheduler`, or one like it.")
    args: list[Any] = field(factory=list, doc="Positional arguments after the optimizer.")
    kwargs: dict[str, Any] = field(factory=dict, doc="Keyword arguments.")
    interval: Literal["step", "epoch"] = field(
        default="epoch", doc="Step it once per optimizer step, or once per epoch; never once per process."
    )
    metric: str = field(default="val_loss", doc="The value `ReduceLROnPlateau` is given (it needs `interval: epoch`).")


@section
class EMAConfig:
    """An exponential moving average of the weights."""

    decay: Float = field(default=0.999, ge=0, lt=1, doc="Share of the old average that is kept at each optimizer step.")
    start_step: Int = field(default=0, ge=0, doc="Optimizer steps during which the average is just the weights.")
    evaluate: Bool = field(default=True, doc="Validate, test and pick the best checkpoint with the averaged weights.")


@section
class TrackingConfig:
    """Where numbers go besides ``history.jsonl``."""

    tensorboard: Bool | None = field(default=None, doc="Write TensorBoard events; null: if TensorBoard is installed.")
    wandb: dict[str, Any] | None = field(default=None, doc="Arguments of `wandb.init`; null: no Weights & Biases.")
    mlflow: dict[str, Any] | None = field(default=None, doc="Arguments of `mlflow.start_run`; null: no MLflow.")
    sinks: list[ObjectRef] = field(
        factory=list, doc="Own sinks: classes with `start(config)`, `log(values, step)` and `close()`."
    )


@section
class TrainingConfig(LoaderConfig):
    """The training itself."""

    path: str = field(doc="The run's folder: configuration, logs, history, checkpoints and figures go here.")
    num_epochs: Int | None = field(
        default=None, ge=0, doc="Number of passes over the training data. Give this or `num_steps`."
    )
    num_steps: Int | None = field(
        default=None, ge=1, doc="Number of optimizer steps, over as many passes as that takes, the last maybe in part."
    )
    batch_size: Int | None = field(
        default=None, ge=1, doc="Samples per rank: a global batch has `batch_size` x world size samples."
    )
    global_batch_size: Int | None = field(
        default=None,
        ge=1,
        doc="Samples of a global batch over all ranks, whatever their number (then give no `batch_size`). It need not "
        "divide by the world size.",
    )
    accumulation_steps: Int = field(default=1, ge=1, doc="Global batches per optimizer step; gradients travel once.")
    seed: Int = field(
        default=42, ge=0, doc="Seed of splits, order, initial weights, and (with the rank) of model randomness."
    )
    device: str = field(default="auto", doc="`auto`, `cpu`, `cuda` (the rank's own device) or `cuda:N`.")
    dtype: Literal["float32", "float64", "bfloat16"] | None = field(
        default=None, doc="Type of weights and of the batches' floating-point tensors; null leaves both as they come."
    )
    mixed_precision: Literal["bf16", "fp16"] | None = field(
        default=None, doc="Autocast the forward pass; `fp16` scales the loss. Weights stay as they are."
    )
    optimizer_type: ObjectRef = field(
        factory=lambda: import_object("torch.optim.AdamW"), doc="The optimizer's class. Default: torch.optim.AdamW."
    )
    optimizer_args: list[Any] = field(factory=list, doc="Positional arguments after the parameters.")
    optimizer_kwargs: dict[str, Any] = field(factory=dict, doc="Keyword arguments: `lr`, `weight_decay`, ...")
    parameter_groups: list[ParameterGroupConfig] = field(
        factory=list,
        doc="Parameters with optimizer settings of their own. A parameter goes to the first group that names it; those "
        "that none names come first in the optimizer, with `optimizer_kwargs` alone.",
    )
    frozen: list[FrozenConfig] = field(
        factory=list,
        doc="Parts that are not trained at first: their gradients are dropped before clipping, so that the optimizer "
        "passes them over.",
    )
    scheduler: SchedulerConfig | None = field(default=None, doc="Learning-rate scheduler; null keeps the rate.")
    clip_grad_norm: Float | None = field(default=None, gt=0, doc="Scale gradients down to this total 2-norm.")
    clip_grad_value: Float | None = field(default=None, gt=0, doc="Clip each gradient element to this magnitude.")
    compile: Bool | CompileConfig = field(
        default=False, doc="Run the model through `torch.compile`; true or its arguments."
    )
    ema: EMAConfig | None = field(default=None, doc="Keep a moving average of the weights; null: none.")
    shuffle: Bool = field(default=True, doc="A new order of the samples each epoch, the same whatever the world size.")
    tf32: Bool | None = field(
        default=None,
        doc="Let CUDA compute float32 matrix products and convolutions in TF32 (10 bits of mantissa, several times as "
        "fast); null leaves PyTorch's choice. It holds while the trainer works.",
    )
    cudnn_benchmark: Bool | None = field(
        default=None,
        doc="Let cuDNN measure its algorithms once for each shape and take the fastest, which may differ from run to "
        "run; null leaves PyTorch's choice. It holds while the trainer works.",
    )
    channels_last: Bool = field(
        default=False,
        doc="Lay out the model's and the batches' four-dimensional tensors with channels last, as a GPU's convolutions "
        "in half precision want them.",
    )
    count_flops: Bool = field(
        default=False,
        doc="Count the floating-point operations of the run's first step; each epoch's row then has `samples_per_s`, "
        "`tflops_per_s` and, on a GPU whose peak is known, `mfu`.",
    )
    gc_every_steps: Int | None = field(
        default=None,
        ge=1,
        doc="Collect Python's garbage after every n-th optimizer step, on all ranks at once, and never in between; "
        "what lives after warm-up is left out. null leaves it to Python.",
    )
    nan_policy: Literal["stop", "skip", "continue"] = field(
        default="stop",
        doc="When a loss is not finite: `stop` the run, `skip` the optimizer step (looks at every step's gradients), "
        "or `continue` with a warning. Each says rank, epoch, step and sample ids. Weights that are not finite are "
        "never saved, short of `continue`.",
    )
    checkpoint_at: Int | None = field(
        default=None, ge=1, doc="Checkpoint after every n-th epoch; the last is always kept."
    )
    checkpoint_every_steps: Int | None = field(default=None, ge=1, doc="Checkpoint after every n-th optimizer step.")
    keep_last: Int = field(default=3, ge=1, doc="Newest checkpoints to keep.")
    keep_best: Int = field(default=1, ge=0, doc="Best checkpoints to keep.")
    keep_every: Int = field(default=0, ge=0, doc="Keep checkpoints at every n-th step for good; 0: none.")
    best_metric: str = field(default="val_loss", doc="What `best` means: `val_loss`, `train_loss` or `val_<metric>`.")
    best_mode: Literal["min", "max"] = field(default="min", doc="Whether the best is the smallest or the largest.")
    resume: str = field(
        default="auto",
        doc="`auto`: go on from the newest whole checkpoint of the run's folder; `never`; or a checkpoint's path.",
    )
    after_save: ObjectRef | None = field(
        default=None,
        doc="A function that rank 0 calls with a `SavedTraining` when a checkpoint is whole on the disk, beside the "
        "training, in the writer's thread. What it raises ends the run, as a checkpoint that cannot be written does.",
    )
    ledger: Bool = field(
        default=False, doc="Write the sample ids of every committed optimizer step to the run's `ledger/`."
    )
    handle_signals: Bool = field(
        default=True, doc="On SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C: checkpoint on all ranks at one step, then stop."
    )
    log_every_steps: Int = field(default=10, ge=1, doc="Record the loss of every n-th optimizer step in the history.")
    progress: Literal["auto", "live", "plain", "off"] = field(
        default="auto", doc="Progress on rank 0: `live` display, `plain` lines, `off`; `auto` is live on a terminal."
    )
    plots: Bool = field(default=True, doc="Draw `curves.png` when training ends (needs matplotlib).")
    tracking: TrackingConfig = field(factory=lambda: TrackingConfig(), doc="Experiment trackers.")


def _gather_settings(value: Any) -> Any:
    """Move the keys beside ``type`` (those of GNNModel, for one) into ``settings``."""
    if not isinstance(value, Mapping) or "settings" in value:
        return value
    known = {"type", "args", "kwargs"}
    settings = {key: item for key, item in value.items() if key not in known}
    return {**{key: value[key] for key in value if key in known}, "settings": settings}


@section
class ModelConfig:
    """The model. Keys beside ``type`` are the model's own configuration."""

    type: ObjectRef = field(doc="`GNNModel`, or any class or function that returns a `torch.nn.Module`.")
    args: list[Any] = field(factory=list, doc="Positional arguments.")
    kwargs: dict[str, Any] = field(factory=dict, doc="Keyword arguments.")
    settings: dict[str, Any] = field(
        factory=dict,
        doc="Not written by hand: the keys beside `type` come here. They are given to the class's `from_config` if it "
        "has one, otherwise to the class as keyword arguments.",
    )

    def build(self) -> Any:
        """Return the model."""
        if self.settings and hasattr(self.type, "from_config"):
            return self.type.from_config(dict(self.settings))
        return self.type(*self.args, **self.kwargs, **self.settings)

    def problems(self) -> list[str]:
        """Return what is wrong with keys that a plain class does not take."""
        if not self.settings or hasattr(self.type, "from_config"):
            return []
        parameters = inspect.signature(self.type).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return []
        return [
            f"model.{key}: unknown key.{did_you_mean(key, parameters)} {self.type.__name__} takes: "
            f"{', '.join(parameters) or 'nothing'}."
            for key in self.settings
            if key not in parameters
        ]


@section
class TrainerConfig:
    """Everything TrainerDDP reads."""

    criterion: ObjectRef = field(
        doc="A function `(output, data)` that returns the mean loss over the samples of the batch, a scalar."
    )
    apply_model: ObjectRef | None = field(
        default=None,
        doc="A function `(model, data)` that returns the output; null calls `model(data)`, or "
        "`model(data[0])` where the batch is a tuple or list.",
    )
    model: Annotated[ModelConfig, pydantic.BeforeValidator(_gather_settings)] = field(doc="The model.")
    training: TrainingConfig = field(doc="The training.")
    validation: ValidationConfig = field(factory=lambda: ValidationConfig(), doc="Validation.")
    testing: TestingConfig = field(factory=lambda: TestingConfig(), doc="The test.")
    early_stopping: EarlyStoppingConfig | None = field(default=None, doc="Early stopping; null trains for all epochs.")
    data: DataConfig | None = field(default=None, doc="The dataset; null if `prepare_dataloaders` is given one.")
    parallel: ParallelConfig | None = field(default=None, doc="Required when there is more than one process.")

    @property
    def test_on(self) -> Literal["rank0", "all"]:
        """Who evaluates the test set: ``testing.on``, or what null stands for."""
        return self.testing.on or ("all" if self.is_sharded else "rank0")

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the model."""
        return self.parallel is not None and self.parallel.strategy == "fsdp2"


def read_config(values: Any) -> TrainerConfig:
    """Return a mapping as a TrainerConfig.

    Raises:
        ConfigError: It lists every mistake with its path, what was found and what is allowed.
    """
    return build(TrainerConfig, values, what="trainer's configuration", checks=_contradictions)


def read_app_config(cfg: Any) -> dict[str, Any]:
    """Return the trainer's sections of an app's configuration, with what follows from the run.

    Args:
        cfg: The resolved configuration of the run, whose ``app`` holds the sections.
    """
    from omegaconf import OmegaConf

    app = OmegaConf.to_container(cfg.app, resolve=True)
    assert isinstance(app, dict)
    config = {str(key): value for key, value in app.items() if key not in ("_target_", "name", "preload")}
    return {**config, "training": {"path": cfg.run.dir, "resume": cfg.get("resume", "auto"), **config["training"]}}


def read_model_config(values: Mapping[str, Any]) -> ModelConfig:
    """Return the ``model`` section alone.

    Raises:
        ConfigError: If it has mistakes.
    """
    return build(ModelConfig, _gather_settings(values), what="model's configuration")


def plain_config(config: TrainerConfig) -> dict[str, Any]:
    """Return the whole configuration, defaults included, as a mapping that ``read_config`` takes back.

    It is written down and shown: a text under a key that holds a secret (``api_key``) is ``***``.
    """
    mapping = as_mapping(config)
    mapping["model"].update(mapping["model"].pop("settings"))
    whole: dict[str, Any] = masked(mapping)
    return whole


def _contradictions(config: TrainerConfig) -> list[str]:
    """Return the problems that lie between several keys."""
    training, parallel = config.training, config.parallel or ParallelConfig()
    fsdp2 = config.is_sharded
    rules = [
        (
            (training.batch_size is None) == (training.global_batch_size is None),
            "training: give either batch_size (samples per rank) or global_batch_size (samples over all ranks), "
            f"but {'both' if training.batch_size else 'neither'} was found.",
        ),
        (
            (training.num_epochs is None) == (training.num_steps is None),
            "training: give either num_epochs (passes over the data) or num_steps (optimizer steps), but "
            f"{'neither' if training.num_epochs is None else 'both'} was found.",
        ),
        (
            config.validation.every_n_steps is not None and config.validation.every != 1,
            f"validation: every {config.validation.every} (epochs) and every_n_steps {config.validation.every_n_steps} "
            "were found; give one.",
        ),
        (
            training.scheduler is not None
            and training.scheduler.interval == "step"
            and getattr(training.scheduler.type, "__name__", "") == "ReduceLROnPlateau",
            "training.scheduler.interval: found 'step', but ReduceLROnPlateau needs a validation result; use 'epoch'.",
        ),
        (
            parallel.shares == "measured" and (fsdp2 or bool(training.compile)),
            "parallel.shares: found 'measured', but a rank's own time cannot be told where its forward pass "
            f"{'gathers parameters (parallel.strategy fsdp2)' if fsdp2 else 'is compiled (training.compile)'}; give a "
            "list of numbers, or even.",
        ),
        (
            config.data is not None and min(config.data.split) < 0,
            "data.split: its three numbers must not be negative.",
        ),
    ]
    rules += against_local_updates(parallel)
    rules += _against_fsdp2(config) if fsdp2 else []
    for name in ("training", "validation", "testing"):
        part = getattr(config, name)
        rules.append(
            (
                part.prefetch_factor is not None and part.num_workers == 0,
                f"{name}.prefetch_factor: found {part.prefetch_factor}, but with {name}.num_workers 0 nothing reads "
                "ahead; set num_workers to 1 or more, or leave prefetch_factor out.",
            )
        )
    return [message for broken, message in rules if broken] + config.model.problems()


def _against_fsdp2(config: TrainerConfig) -> list[tuple[bool, str]]:
    """Return what does not go with a sharded model."""
    training, parallel = config.training, config.parallel or ParallelConfig()
    return [
        *(
            (
                section.on == "rank0",
                f"{name}.on: found 'rank0', but with parallel.strategy fsdp2 no rank holds the whole model; use 'all'.",
            )
            for name, section in (("validation", config.validation), ("testing", config.testing))
        ),
        (
            training.mixed_precision == "fp16",
            "training.mixed_precision: found 'fp16', which parallel.strategy fsdp2 does not scale; use 'bf16'.",
        ),
        (
            parallel.comm_hook is not None,
            "parallel.comm_hook: it compresses DDP's gradients; with parallel.strategy fsdp2 leave it null.",
        ),
        (
            parallel.sync_batchnorm,
            "parallel.sync_batchnorm: only with parallel.strategy ddp; with fsdp2 use layers without batch statistics.",
        ),
        (
            training.channels_last,
            "training.channels_last: parallel.strategy fsdp2 shards rows of plain tensors only; leave it false.",
        ),
    ]
