"""Video restoration as an app of everyrank: ``run.py app=video_restoration app.opt=options/....json``."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from everyrank import CheckpointError, ConfigError, SeededDataset, TrainerDDP, World, agree, join
from everyrank.apps.video_restoration import training
from everyrank.apps.video_restoration.checkpoints import newest_legacy
from everyrank.apps.video_restoration.data.datasets import TestDataset, TrainDataset
from everyrank.apps.video_restoration.data.demo import resolve_demo
from everyrank.apps.video_restoration.options import load_options
from everyrank.apps.video_restoration.picture import write_picture

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


class VideoRestorationApp:
    """Trains VRT from a legacy option file, whatever launcher started the ranks."""

    def run(self, cfg: DictConfig) -> dict[str, Any]:
        """Join, read the option file ``cfg.app.opt`` and do what it says.

        Returns:
            See :func:`run_options`.

        Raises:
            UserError: The options, data or weights are wrong.
        """
        with join(**cfg.distributed) as world:
            return run_options(str(cfg.app.opt), world)

    def trainer_config(self, cfg: DictConfig) -> dict[str, Any]:
        """Return what the trainer will be given, for ``everyrank plan``."""
        return training.trainer_config(load_options(str(cfg.app.opt)))


def run_options(path: str, world: World) -> dict[str, Any]:
    """Train (or, without training data, test) as an option file says.

    Args:
        path: The option file.
        world: The joined world.

    Returns:
        ``iterations``, ``world_size``, ``folder``, the last ``loss`` and the metrics of the last validation.

    Raises:
        UserError: The options, data or weights are wrong.
        Preempted: A signal asked the run to stop; its checkpoint is safe.
    """
    options = agree(lambda: load_options(path))
    agree(lambda: resolve_demo(options) if world.is_local_main else None)
    train_data, test_data = agree(lambda: _datasets(resolve_demo(options)))
    world = choose_device(world, options["gpu_ids"])
    config = agree(lambda: training.trainer_config(options, world.world_size))
    agree(lambda: _keep_options(options), on=0)
    trainer = TrainerDDP(config=config, world=world)
    _describe(options, trainer)
    loaders = trainer.prepare_dataloaders(
        train_dataset=train_data, val_dataset=test_data, test_dataset=test_data, collate_fn=training.collate_clips
    )
    loss = None
    if train_data is not None:
        _go_on(trainer, options)
        history, _ = trainer.run_training(*loaders[:2])
        loss = history[-1]["loss"]
    found: Any = trainer.validator
    if test_data is not None and found.clips is None:
        trainer.run_test(loaders[2])
        found = trainer.tester
    result = {
        "iterations": trainer.step,
        "world_size": world.world_size,
        "folder": options["path"]["task"],
        "loss": loss,
    }
    if found.clips and world.is_main:
        print(found.table(), flush=True)
        (Path(options["path"]["task"]) / "scores.txt").write_text(found.table() + "\n", encoding="utf-8")
        if found.example is not None and options["val"]["side_by_side"]:
            picture = Path(options["path"]["images"]) / f"side_by_side_{trainer.step}.png"
            write_picture(picture, found.example, found.baseline)
            logger.info("side by side: %s", picture)
    return result | found.summary()


def choose_device(world: World, gpu_ids: object) -> World:
    """Return ``world`` on the first of ``gpu_ids`` if it is a single process on a machine with that GPU."""
    if world.is_distributed or world.device.type != "cuda":
        return world
    first = gpu_ids[0] if isinstance(gpu_ids, list) and gpu_ids else gpu_ids
    if not isinstance(first, int) or not 0 <= first < torch.cuda.device_count():
        return world
    device = torch.device("cuda", first)
    torch.cuda.set_device(device)
    return dataclasses.replace(world, device=device)


def _datasets(options: Mapping[str, Any]) -> tuple[Any, Any]:
    sections, train = options["datasets"], options["train"]
    noise_map, interpolation = options["netG"]["nonblind_denoising"], options["netG"]["pa_frames"] == 0
    train_data = test_data = None
    if "test" in sections:
        test_data = TestDataset(sections["test"], noise_map=noise_map, interpolation=interpolation)
    if "train" in sections and train["total_iter"] > 0:
        train_data = SeededDataset(TrainDataset(sections["train"], noise_map=noise_map), train["manual_seed"])
    return train_data, test_data


def _keep_options(options: Mapping[str, Any]) -> None:
    folder = Path(options["path"]["task"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "options.json").write_text(json.dumps(options, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"path.root: {folder} cannot be written ({error}); set a folder that can be") from error


def _go_on(trainer: TrainerDDP, options: Mapping[str, Any]) -> None:
    """Start from what is not the trainer's: legacy files newer than its checkpoints, or an average to start with."""
    train, models = options["train"], Path(options["path"]["models"])

    def read(after: int) -> Any:
        return newest_legacy(models, trainer.module, after=after)

    # Rank 0 looks and decides; the others read the file that it found.
    iteration = agree(lambda: found.iteration if (found := read(trainer.step)) else None, on=0)
    if iteration is not None:
        saved = read(iteration - 1)
        if saved is None or saved.iteration != iteration:
            raise CheckpointError(
                f"rank 0 read {models}/{iteration}_G.pth, but rank {trainer.world.rank} cannot: share the folder"
            )
        optimizer = saved.optimizer if train["G_optimizer_reuse"] else None
        trainer.start_from(iteration, saved.network, saved.average, optimizer)
        logger.info("resumed at iteration %d from %s (legacy: random state starts anew)", iteration, models)
    elif trainer.step:
        logger.info("resumed exactly at iteration %d from %s", trainer.step, trainer.run / "checkpoints")
        if not train["G_optimizer_reuse"]:
            trainer.optimizer.state.clear()
    elif options["path"]["pretrained_netE"] and train["E_decay"] > 0:
        average = training.build_network(
            options["path"]["pretrained_netE"], train["E_param_strict"], **options["netG"]
        ).state_dict()
        trainer.start_from(0, trainer.module.state_dict(), average)


def _describe(options: Mapping[str, Any], trainer: TrainerDDP) -> None:
    """Log what an old option file may leave unclear."""
    world = trainer.world
    logger.info("VRT with %.2f M parameters", sum(p.numel() for p in trainer.module.parameters()) / 1e6)
    if options["dist"] is not None and options["dist"] != world.is_distributed:
        logger.info(
            "dist is %s in the options and ignored: this run has %d process(es), as its launcher started them",
            str(options["dist"]).lower(),
            world.world_size,
        )
    gpu_ids = options["gpu_ids"]
    if isinstance(gpu_ids, list) and len(gpu_ids) != world.world_size:
        text = "gpu_ids %s is informational: this run has %d process(es), this one on %s"
        logger.info(text, gpu_ids, world.world_size, world.device)
    train = options["datasets"].get("train")
    if train is None:
        return
    batch, workers, size = train["dataloader_batch_size"], train["dataloader_num_workers"], world.world_size
    each = f"{batch // size}" if batch % size == 0 else f"{batch // size} or {batch // size + 1}"
    text = "dataloader_batch_size is %d in total, %s per rank; dataloader_num_workers is %d in total, %d per rank"
    logger.info(text, batch, each, workers, -(-workers // size))
    if batch < size:
        text = "dataloader_batch_size %d is less than the %d ranks: %d of them have nothing to do in each step"
        logger.warning(text, batch, size, size - batch)
