"""The ``parallel`` section: how the ranks find each other and how gradients travel between them."""

from __future__ import annotations

from typing import Literal

from everyrank.config.schema import Bool, Float, Int, field, section


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
