"""The ``parallel`` section: how the ranks find each other and how gradients travel between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from everyrank.config.resolve import import_object
from everyrank.config.schema import Bool, Float, Int, ObjectRef, field, section
from everyrank.errors import did_you_mean


@section
class OuterOptimizerConfig:
    """What applies the mean of the ranks' updates (DiLoCo); the optimizer of ``training`` is then the inner one."""

    type: ObjectRef = field(
        factory=lambda: import_object("torch.optim.SGD"), doc="The optimizer's class. Default: torch.optim.SGD."
    )
    args: list[Any] = field(factory=list, doc="Positional arguments after the parameters.")
    kwargs: dict[str, Any] = field(
        factory=lambda: {"lr": 0.7, "momentum": 0.9, "nesterov": True},
        doc="Keyword arguments. The default is DiLoCo's: SGD with Nesterov momentum.",
    )


@section
class LocalUpdatesConfig:
    """Optimizer steps of each rank on its own, for ranks that are joined by a slow network.

    Nothing is sent between two syncs of the ranks. At a sync the parameters are averaged (local SGD), or an
    outer optimizer is given the mean of the ranks' updates (DiLoCo, arXiv:2311.08105).
    """

    every: Int = field(default=32, ge=1, doc="Optimizer steps from one sync to the next.")
    start_step: Int = field(
        default=0, ge=0, doc="Optimizer steps at the start of the run in which gradients are averaged, as in DDP."
    )
    outer_optimizer: OuterOptimizerConfig | None = field(
        default=None, doc="null: average the parameters. `{}`: SGD with Nesterov momentum, as in DiLoCo."
    )
    compress: Literal["bf16"] | None = field(
        default=None, doc="Send the updates in bfloat16, half the bytes; null sends them as they are."
    )


def _shares(value: Any) -> Any:
    if value in ("even", "measured"):
        return value
    numbers = isinstance(value, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in value)
    if not value or not numbers or not all(0 < n < float("inf") for n in value):
        hint = did_you_mean(value, ("even", "measured")) if isinstance(value, str) else ""
        raise ValueError(
            f"found {value!r}, but it must be even, measured, or a list of positive numbers, one for each rank.{hint}"
        )
    return [float(n) for n in value]


@section
class ParallelConfig:
    """What a distributed run needs beyond a single-process one."""

    world_size: Int | None = field(
        default=None, ge=1, doc="Number of processes. The launcher's value wins, with a notice when the two differ."
    )
    rank: Int | None = field(
        default=None,
        ge=0,
        doc="This process's rank. Leave it null: the launcher (or the caller) sets it, and its value wins.",
    )
    master_addr: str = field(
        default="localhost",
        doc="Host of rank 0, for scripts that pass it to `initialize_ddp`; a launcher's own value wins.",
    )
    master_port: str | Int = field(
        default="12355", doc="Port of rank 0, as text or number, for scripts that pass it to `initialize_ddp`."
    )
    strategy: Literal["ddp", "fsdp2"] = field(
        default="ddp",
        doc="`ddp` keeps a whole model on every rank; `fsdp2` shards parameters, gradients and optimizer state, for "
        "models that do not fit one device.",
    )
    output_device: str | Int | None = field(
        default=None, doc="Device of the wrapped model's output (CUDA only); null is the rank's own device."
    )
    find_unused_parameters: Bool = field(
        default=False,
        doc="Let DDP look for parameters that a forward pass did not use. Costs time; needed if there are any.",
    )
    static_graph: Bool = field(
        default=False,
        doc="Promise DDP that every step uses the same parameters in the same way; it then does less per step.",
    )
    gradient_as_bucket_view: Bool = field(
        default=True, doc="Let gradients live inside DDP's communication buffers: one copy less per step, less memory."
    )
    broadcast_buffers: Bool = field(
        default=True, doc="Let DDP send rank 0's buffers (batch statistics) to all ranks before each forward pass."
    )
    bucket_cap_mb: Float | None = field(
        default=None, gt=0, doc="Size of DDP's gradient buckets in MiB; null is PyTorch's default."
    )
    sync_batchnorm: Bool = field(
        default=False, doc="Turn BatchNorm layers into SyncBatchNorm: statistics over the global batch (CUDA only)."
    )
    comm_hook: Literal["bf16", "fp16", "powersgd"] | None = field(
        default=None,
        doc="Compress gradients on the wire: `bf16`, `fp16`, or low-rank `powersgd`. null sends them as they are.",
    )
    powersgd_rank: Int = field(default=1, ge=1, doc="Rank of PowerSGD's approximation; larger is closer and slower.")
    powersgd_start_step: Int = field(
        default=1000,
        ge=2,
        doc="Optimizer steps with exact gradients before PowerSGD begins (it is unstable in early training).",
    )
    shares: Annotated[Any, pydantic.BeforeValidator(_shares), "`even`, `measured` or a list of numbers"] = field(
        default="even",
        doc="How the ranks share each global batch of the training: `even`; in proportion to a list of numbers, one "
        "for each rank, such as `[3, 1]` for a GPU that is three times as fast as the other; `measured`: by the "
        "speed of each rank, measured in the first steps of each epoch and followed from the next epoch on. The "
        "steps are the same, to rounding, however the batch is shared.",
    )
    local_updates: LocalUpdatesConfig | None = field(
        default=None,
        doc="Let each rank take optimizer steps on its own and bring the ranks together now and then; null shares the "
        "gradients of every step. **The result then depends on the number of ranks.**",
    )


def against_local_updates(parallel: ParallelConfig) -> list[tuple[bool, str]]:
    """Return what does not go with ``parallel.local_updates``: what would send something in each step."""
    if parallel.local_updates is None:
        return []
    return [
        (
            parallel.strategy == "fsdp2",
            "parallel.local_updates: every rank needs a whole model, but parallel.strategy is 'fsdp2'; use 'ddp'.",
        ),
        (
            parallel.comm_hook is not None,
            f"parallel.comm_hook: found {parallel.comm_hook!r}, but with parallel.local_updates no gradients travel; "
            "leave it null, and set parallel.local_updates.compress to 'bf16' to send less.",
        ),
        (
            parallel.sync_batchnorm,
            "parallel.sync_batchnorm: found true, but it sends statistics in each step, which parallel.local_updates "
            "is there to avoid; set it to false, or use layers without batch statistics (LayerNorm, GroupNorm).",
        ),
        (
            parallel.shares != "even",
            f"parallel.shares: found {parallel.shares!r}, but with parallel.local_updates each rank takes steps of its "
            "own, all of one weight; leave it even.",
        ),
        (
            parallel.static_graph or parallel.find_unused_parameters,
            "parallel.static_graph and parallel.find_unused_parameters: they are DDP's, which parallel.local_updates "
            "does without; leave them out.",
        ),
    ]
