"""What a run is built of, and what it says about itself when it starts."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from everyrank.apps.video_restoration.network.vrt import VRT
from everyrank.apps.video_restoration.optimisation import build_optimizer, check_fix_keys
from everyrank.apps.video_restoration.weights import load_weights
from everyrank.errors import ConfigError
from everyrank.runtime.world import World

logger = logging.getLogger(__name__)


def build_model(options: Mapping[str, Any], device: torch.device) -> tuple[VRT, VRT | None, torch.optim.Optimizer]:
    """Return the network with its first weights, its moving average (or None) and the optimizer."""
    train, path = options["train"], options["path"]
    network = VRT(**options["netG"]).to(device)
    check_fix_keys(network, train)
    if path["pretrained_netG"]:
        load_weights(network, path["pretrained_netG"], strict=train["G_param_strict"])
    average = None
    if train["E_decay"] > 0:
        average = copy.deepcopy(network).eval().requires_grad_(False)
        if path["pretrained_netE"]:
            load_weights(average, path["pretrained_netE"], strict=train["E_param_strict"])
    return network, average, build_optimizer(network, train)


def describe(options: Mapping[str, Any], world: World, network: VRT) -> None:
    """Log what an old option file may leave unclear, and keep the resolved options beside the results."""
    logger.info("VRT with %.2f M parameters", sum(p.numel() for p in network.parameters()) / 1e6)
    if options["dist"] is not None and options["dist"] != world.is_distributed:
        logger.info(
            "dist is %s in the options and ignored: this run has %d process(es), as its launcher started them",
            str(options["dist"]).lower(),
            world.size,
        )
    gpu_ids = options["gpu_ids"]
    if isinstance(gpu_ids, list) and len(gpu_ids) != world.size:
        logger.info(
            "gpu_ids %s is informational: this run has %d process(es), this one on %s",
            gpu_ids,
            world.size,
            world.device,
        )
    train = options["datasets"].get("train")
    if train is not None:
        batch, workers, size = train["dataloader_batch_size"], train["dataloader_num_workers"], world.size
        logger.info(
            "dataloader_batch_size is %d in total, %s per rank; dataloader_num_workers is %d in total, %d per rank",
            batch,
            f"{batch // size}" if batch % size == 0 else f"{batch // size} or {batch // size + 1}",
            workers,
            -(-workers // size),
        )
        if batch < size:
            logger.warning(
                "dataloader_batch_size %d is less than the %d ranks: %d of them have nothing to do in each step",
                *(batch, size, size - batch),
            )
    if world.is_main:
        folder = Path(options["path"]["task"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "options.json").write_text(json.dumps(options, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"path.root: {folder} cannot be written ({error}); set a folder that can be") from error
