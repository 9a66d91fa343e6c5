"""The sections of a run that are no driver's and no app's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from everyrank.config.schema import field, section


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


@section
class RunConfig:
    """``run``: where a run lives and how much it says."""

    name: str | None = field(
        default=None, doc="Name of the run's folder; null: the app's name and a hash of its settings."
    )
    dir: str | None = field(default=None, doc="The run's folder; null: <env.output_dir>/<run.name>.")
    prefix: Literal["auto", "rank", "none"] = field(
        default="auto",
        doc="What stands before each line of a program on the console: [rank 1], or nothing; auto: the rank, on a "
        "terminal.",
    )
    show: Literal["all", "main", "failed"] = field(
        default="all",
        doc="Whose lines of a program the console shows: those of all ranks, of rank 0, or of failed ranks at the end. "
        "The logs have all.",
    )
    program: dict[str, Any] | None = field(default=None, doc="Set by the launch, for an app that is a program.")
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None, pydantic.BeforeValidator(_upper)
    ] = field(default=None, doc="Level of the console log; null: INFO on rank 0, WARNING elsewhere.")


@section
class RehearseConfig:
    """``rehearse``: whether a GPU program runs on the CPU."""

    rehearse: Literal["cpu"] | None = field(
        default=None, doc="cpu: a program for CUDA and NCCL runs its training on CPU ranks, unchanged."
    )


@section
class DistributedConfig:
    """``distributed``: how the processes join."""

    backend: Literal["auto", "nccl", "gloo", "mpi"] = field(
        default="auto", doc="nccl on CUDA and gloo otherwise, if auto."
    )
    init_method: str = field(default="env://", doc="env://, file:///path on a shared disk, or tcp://host:port.")
    timeout_s: float = field(default=600.0, gt=0, le=1e9, doc="Seconds until joining, or a collective, gives up.")
    device: str = field(default="auto", doc="auto, cpu or cuda.")


@section
class EnvConfig:
    """``env``: this machine."""

    output_dir: str = field(default="outputs", doc="Folder of the runs' folders.")
    data_dir: str = field(default="data", doc="Folder of caches and datasets.")
    variables: dict[str, str] = field(factory=dict, doc="Environment variables for every rank.")
