"""The sections of a run that are no driver's and no app's."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import pydantic

from everyrank.config.schema import field, section
from everyrank.errors import ConfigError, did_you_mean


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


def check_resume(resume: Any, *, is_program: bool) -> None:
    """Check ``resume`` as far as it can be told before a run: a path may be of another machine.

    Args:
        resume: The setting.
        is_program: Whether the run is of a program, which is not told of checkpoints.

    Raises:
        ConfigError: It is no word, and nearly one; or is one that nothing would heed.
    """
    if resume in ("auto", "never"):
        return
    hint = did_you_mean(resume, ("auto", "never"))
    if not isinstance(resume, str) or (hint and not os.path.exists(resume)):
        raise ConfigError(
            f"resume={resume} was set, but it is auto, never or the path of a checkpoint.{hint} Fix: set one of these."
        )
    if is_program:
        raise ConfigError(
            f"resume={resume} was set, but a program is not told of it. Fix: give the program the path as an argument "
            "of its own."
        )
