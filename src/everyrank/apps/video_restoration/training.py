"""What an option file means as a configuration of the trainer."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from everyrank import ConfigError, collate, did_you_mean
from everyrank.apps.video_restoration.checkpoints import LegacyFiles
from everyrank.apps.video_restoration.data.datasets import TrainDataset
from everyrank.apps.video_restoration.losses import RestorationLoss
from everyrank.apps.video_restoration.network.vrt import VRT
from everyrank.apps.video_restoration.validation import ClipTester, ClipValidator
from everyrank.apps.video_restoration.weights import load_weights

logger = logging.getLogger(__name__)


def trainer_config(options: Mapping[str, Any], world_size: int = 1) -> dict[str, Any]:
    """Return the configuration of ``TrainerDDP`` that resolved options mean.

    Args:
        options: What ``load_options`` returned.
        world_size: Number of processes, over which loader processes are divided.
    """
    train, path, network = options["train"], options["path"], options["netG"]
    data = options["datasets"].get("train") if train["total_iter"] > 0 else None
    test = options["datasets"].get("test")
    measured = test is not None and bool(test["dataroot_gt"])
    config: dict[str, Any] = {
        "criterion": RestorationLoss(train["G_lossfn_type"], train["G_lossfn_weight"], train["G_charbonnier_eps"]),
        "apply_model": restore,
        "model": {
            "type": build_network,
            "pretrained": path["pretrained_netG"],
            "strict": train["G_param_strict"],
            "fix_keys": train["fix_keys"],
            **network,
        },
        "training": {
            **_data_keys(path, train, data, world_size),
            **_optimizer_keys(train),
            "seed": train["manual_seed"],
            "mixed_precision": "bf16" if train["precision"] == "bf16" else None,
            "ema": {"decay": train["E_decay"]} if train["E_decay"] > 0 else None,
            "checkpoint_every_steps": train["checkpoint_save"] or None,
            "keep_last": 2,
            "best_metric": "val_psnr" if measured else "val_loss",
            "best_mode": "max" if measured else "min",
            "after_save": LegacyFiles(Path(path["models"])),
            "log_every_steps": train["checkpoint_print"] or 1,
            "tracking": {"sinks": [LogLines]},
        },
        **_evaluation_sections(options),
        "parallel": {
            "find_unused_parameters": options["find_unused_parameters"],
            "static_graph": options["use_static_graph"],
            "broadcast_buffers": False,  # they are constants
        },
    }
    if data is not None:
        kwargs = {"options": data, "noise_map": network["nonblind_denoising"]}
        config["data"] = {"type": TrainDataset, "kwargs": kwargs, "split": [1.0, 0.0, 0.0]}
    _merge(config, options["trainer"])
    if test is not None and config["parallel"].get("strategy") == "fsdp2":
        raise ConfigError(
            "trainer.parallel.strategy: found 'fsdp2', but clips are tested part by part, for which each rank needs "
            "the whole network. Fix: leave datasets.test out, or use 'ddp'."
        )
    return config


def _evaluation_sections(options: Mapping[str, Any]) -> dict[str, Any]:
    train, test = options["train"], options["datasets"].get("test")
    clips = {
        "val": options["val"],
        "scale": options["scale"],
        "border": test["border"] if test is not None else 0,
        "interpolation": options["netG"]["pa_frames"] == 0,
        "images": options["path"]["images"],
    }
    return {
        "validation": {
            "batch_size": 1,
            "every_n_steps": train["checkpoint_test"] or max(train["total_iter"], 1),
            "validator": {"type": ClipValidator, "kwargs": clips},
        },
        "testing": {"batch_size": 1, "tester": {"type": ClipTester, "kwargs": clips}},
    }


def _data_keys(
    path: Mapping[str, Any], train: Mapping[str, Any], data: Mapping[str, Any] | None, world_size: int
) -> dict[str, Any]:
    """Where the run goes, how long it is, and its batches."""
    if data is None:
        # A test leaves its numbers beside those of the training, whose checkpoints it does not go on from.
        folder = str(Path(path["task"]) / "test")
        return {"path": folder, "num_epochs": 0, "global_batch_size": 1, "shuffle": False, "pin_memory": True}
    return {
        "path": path["task"],
        "num_steps": train["total_iter"],
        "global_batch_size": data["dataloader_batch_size"],
        "num_workers": -(-data["dataloader_num_workers"] // world_size),
        "shuffle": data["dataloader_shuffle"],
        "pin_memory": True,
    }


def _optimizer_keys(train: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer, what is frozen at first, and how the learning rate falls."""
    rate = train["G_optimizer_lr"]
    fixed = {"match": [f"*{key}*" for key in train["fix_keys"]]}
    is_frozen = bool(train["fix_iter"] and train["fix_keys"])
    own_rate = is_frozen and train["fix_lr_mul"] != 1
    schedule = {key: value for key, value in train.items() if key.startswith("G_scheduler_")}
    return {
        "optimizer_type": torch.optim.AdamW if train["G_optimizer_type"] == "adamw" else torch.optim.Adam,
        "optimizer_kwargs": {"lr": rate, "betas": train["G_optimizer_betas"], "weight_decay": train["G_optimizer_wd"]},
        "parameter_groups": [{**fixed, "optimizer_kwargs": {"lr": rate * train["fix_lr_mul"]}}] if own_rate else [],
        "frozen": [{**fixed, "until_step": train["fix_iter"]}] if is_frozen else [],
        "scheduler": {"type": OptionSchedule, "kwargs": {"train": schedule}, "interval": "step"}
        if train["G_scheduler_type"]
        else None,
        "clip_grad_norm": train["G_optimizer_clipgrad"] or None,
    }


def build_network(
    pretrained: str | None = None, strict: bool = True, fix_keys: Sequence[str] = (), **architecture: Any
) -> VRT:
    """Return a VRT, with weights from a file if one is given.

    Raises:
        ConfigError: The weights do not fit, or a fix key names no parameter.
    """
    network = VRT(**architecture)
    names = [name for name, _ in network.named_parameters()]
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    for key in fix_keys:
        if not any(key in name for name in names):
            raise ConfigError(f"train.fix_keys: no parameter's name contains {key!r}.{did_you_mean(key, parts)}")
    if pretrained:
        load_weights(network, pretrained, strict=strict)
    return network


def restore(network: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the restored clips of a training batch."""
    return network(batch["L"])


def collate_clips(samples: list[Any]) -> Any:
    """Stack training samples; a test clip, which may have any size, is a batch of its own and stays on the CPU."""
    return SimpleNamespace(**samples[0]) if "clip" in samples[0] else collate(samples)


class OptionSchedule(LRScheduler):
    """The learning rates of an option file.

    They are a function of the iteration alone. So what the options say also holds in a run that goes on from a
    checkpoint, whose state is no more than its number.

    Args:
        optimizer: The optimizer.
        train: The resolved ``train`` section.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, train: Mapping[str, Any]) -> None:
        self._train = train
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group in the next iteration."""
        return [learning_rate(float(base), self.last_epoch + 1, self._train) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of iterations done."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that number of iterations."""
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


def learning_rate(base: float, iteration: int, train: Mapping[str, Any]) -> float:
    """Return the learning rate of an iteration.

    Args:
        base: Learning rate that the schedule begins with.
        iteration: Number of the iteration, from 1.
        train: The resolved ``train`` section.
    """
    if train["G_scheduler_type"] == "MultiStepLR":
        passed = bisect.bisect_right(sorted(train["G_scheduler_milestones"]), iteration)
        return base * train["G_scheduler_gamma"] ** passed
    # Cosine annealing with warm restarts (SGDR, arXiv 1608.03983, equation 5), each period with its own height.
    periods, weights = train["G_scheduler_periods"], train["G_scheduler_restart_weights"]
    ends = list(itertools.accumulate(periods))
    iteration = min(iteration, ends[-1])
    number = bisect.bisect_left(ends, iteration)
    phase = math.pi * (iteration - ends[number] + periods[number]) / periods[number]
    low = train["G_scheduler_eta_min"]
    return low + weights[min(number, len(weights) - 1)] * 0.5 * (base - low) * (1 + math.cos(phase))


class LogLines:
    """A line of the log for each recorded iteration; a tracker of the trainer."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Say nothing yet."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log an iteration's loss and learning rate."""
        if "train/loss_step" in values:
            loss, rate = values["train/loss_step"], values["train/lr"]
            logger.info("iteration %d: loss %.6f, lr %.3e", step, loss, rate)

    def close(self) -> None:
        """Say nothing more."""


def _merge(config: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value
