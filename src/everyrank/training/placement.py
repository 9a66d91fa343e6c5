"""Where a trainer runs: its world, its device, and the run's folder and logs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist

from everyrank.errors import ConfigError, LaunchEnvironmentError
from everyrank.launch_env.detection import detect
from everyrank.runtime.logs import get_logger, setup_logging
from everyrank.runtime.process_group import current_world
from everyrank.runtime.world import World
from everyrank.training.config import TrainerConfig
from everyrank.training.saving.replay import folder_of

logger = get_logger("training")


def resolve_world(rank: int | None, world: World | None, config: TrainerConfig) -> World:
    """Return the world to train in: the given one, or the one this process has joined.

    Raises:
        LaunchEnvironmentError: A launcher started several processes, but this one has joined no group; or ``rank`` is
            not this process's.
        ConfigError: The run is distributed but has no ``parallel`` section.
    """
    joined = dist.is_available() and dist.is_initialized()
    world = world if world is not None else current_world()
    if not joined and (found := detect()).world_size > 1:
        raise LaunchEnvironmentError(
            f"A launcher ({found.launcher}, by {found.detected_by}) started {found.world_size} processes, but this one "
            "has joined no process group: each would train alone. Put the trainer inside `with everyrank.join():`, or "
            "call initialize_ddp(rank, world_size) before it."
        )
    if rank is not None and rank != world.rank:
        mend = "Leave rank out, or pass world.rank." if joined else "Call initialize_ddp(rank, world_size) first."
        raise LaunchEnvironmentError(
            f"TrainerDDP was given rank={rank}, but this process is rank {world.rank} of {world.world_size}. {mend}"
        )
    if world.is_distributed and config.parallel is None:
        raise ConfigError(
            f"The run has {world.world_size} processes, but the configuration has no `parallel` section. Add one; "
            "`parallel: {}` takes all defaults."
        )
    return world


def notice_differences(config: TrainerConfig, world: World) -> None:
    """Log where the launcher's world wins over the file's."""
    if config.parallel is None:
        return
    for name, written, real in (
        ("world_size", config.parallel.world_size, world.world_size),
        ("rank", config.parallel.rank, world.rank),
    ):
        if written is not None and written != real and (name == "rank" or world.is_main):
            logger.warning(
                "parallel.%s is %s in the configuration, but this run's is %s, which wins", name, written, real
            )


def training_device(config: TrainerConfig, world: World) -> torch.device:
    """Return the device to train on, and make it the current one: streams and events are the current device's.

    Raises:
        ConfigError: As ``resolve_device``.
    """
    device = resolve_device(config.training.device, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def resolve_device(name: str, world: World, key: str = "training.device") -> torch.device:
    """Return the device that ``name`` means on this rank.

    Raises:
        ConfigError: If there is no such device, or it does not go with the process group.
    """
    if name == "auto":
        return world.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key} is {name!r}; it must be auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"{key} is {name!r}, but this process sees no CUDA GPU. Set it to auto or cpu.")
        if world.is_distributed and device.index not in (None, world.device.index):
            raise ConfigError(
                f"{key} is {name!r}, but each rank has its own GPU ({world.device} here). Set it to cuda."
            )
        device = world.device if device.index is None and world.device.type == "cuda" else device
        if (device.index or 0) >= (visible := torch.cuda.device_count()):
            raise ConfigError(
                f"{key} is {name!r}, but {visible} GPU{'s are' if visible != 1 else ' is'} visible to this process. "
                "Fix: set it to auto or cuda, or widen CUDA_VISIBLE_DEVICES."
            )
        return torch.device("cuda", device.index or 0)
    if world.is_distributed and world.backend == "nccl" and dist.get_backend() == "nccl":
        raise ConfigError(f"{key} is {name!r}, but the process group's backend is nccl. Join with backend='gloo'.")
    return device


def run_folder(config: TrainerConfig) -> Path:
    """Return the run's folder, which need not exist."""
    return folder_of(Path(os.path.expanduser(config.training.path)))


def log_to(path: Path, rank: int) -> None:
    """Send this rank's log to a run's folder too."""
    everyrank_logger = logging.getLogger("everyrank")
    if not everyrank_logger.handlers:
        setup_logging(rank, log_file=path)
        return
    files = [h for h in everyrank_logger.handlers if isinstance(h, logging.FileHandler)]
    if any(Path(handler.baseFilename) == path.resolve() for handler in files):
        return
    # Logging was set up already, for the console or for a run before this one: only add this run's file.
    for handler in files:
        if Path(handler.baseFilename).parent.name == "logs" and getattr(handler, "of_trainer", False):
            everyrank_logger.removeHandler(handler)
            handler.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    added = logging.FileHandler(path, encoding="utf-8")
    added.of_trainer = True  # type: ignore[attr-defined]
    added.setLevel(logging.INFO)
    added.setFormatter(everyrank_logger.handlers[0].formatter)
    everyrank_logger.addHandler(added)
    everyrank_logger.setLevel(min(everyrank_logger.level or logging.INFO, logging.INFO))
