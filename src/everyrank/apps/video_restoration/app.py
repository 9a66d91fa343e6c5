"""Video restoration as an app of everyrank: ``run.py app=video_restoration app.opt=options/....json``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from everyrank.apps.video_restoration.agreement import together
from everyrank.apps.video_restoration.options import load_options
from everyrank.apps.video_restoration.task import run_task
from everyrank.runtime.process_group import join
from everyrank.runtime.world import World

if TYPE_CHECKING:
    from omegaconf import DictConfig


class VideoRestorationApp:
    """Trains VRT from a legacy option file, whatever launcher started the ranks."""

    def run(self, cfg: DictConfig) -> dict[str, Any]:
        """Join, read the option file ``cfg.app.opt`` and do what it says.

        Returns:
            See :func:`everyrank.apps.video_restoration.task.run_task`.

        Raises:
            AgreedError: The options, data or weights are wrong.
        """
        with join(**cfg.distributed) as world:
            options = together(lambda: load_options(str(cfg.app.opt)))
            return run_task(options, choose_device(world, options["gpu_ids"]))


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
