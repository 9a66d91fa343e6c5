"""The optimizer, parts that are frozen at first, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from everyrank.apps.video_restoration.schedules import learning_rate
from everyrank.errors import ConfigError, did_you_mean


def is_fixed(name: str, train: Mapping[str, Any]) -> bool:
    """Tell whether the parameter ``name`` belongs to ``fix_keys``."""
    return any(key in name for key in train["fix_keys"])


def check_fix_keys(network: nn.Module, train: Mapping[str, Any]) -> None:
    """Raise ConfigError for a fix key that no parameter's name contains."""
    names = [name for name, _ in network.named_parameters()]
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    for key in train["fix_keys"]:
        if not any(key in name for name in names):
            raise ConfigError(f"train.fix_keys: no parameter's name contains {key!r}.{did_you_mean(key, parts)}")


def freeze(network: nn.Module, train: Mapping[str, Any], iteration: int) -> bool:
    """Let ``fix_keys`` be trained, or not, in ``iteration`` (from 1); return whether that changed anything.

    When it does, DDP must be built anew: it fixes at construction which parameters it reduces, and so stays right also
    with a static graph.
    """
    frozen = bool(train["fix_keys"]) and iteration <= train["fix_iter"]
    changed = False
    for name, parameter in network.named_parameters():
        if is_fixed(name, train) and parameter.requires_grad == frozen:
            parameter.requires_grad_(not frozen)
            parameter.grad = None
            changed = True
    return changed


def build_optimizer(network: nn.Module, train: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return Adam or AdamW over all parameters, those that are frozen at first included.

    With ``fix_iter``, ``fix_keys`` and ``fix_lr_mul`` other than 1 there are two groups: normal parameters, then those
    of ``fix_keys`` with a scaled rate. Parameters without a gradient are passed over by the optimizer.
    """
    rate, parameters = train["G_optimizer_lr"], dict(network.named_parameters())
    groups: list[dict[str, Any]] = [{"params": list(parameters.values()), "lr": rate}]
    if train["fix_iter"] and train["fix_keys"] and train["fix_lr_mul"] != 1:
        fixed = [p for name, p in parameters.items() if is_fixed(name, train)]
        normal = [p for name, p in parameters.items() if not is_fixed(name, train)]
        groups = [{"params": normal, "lr": rate}, {"params": fixed, "lr": rate * train["fix_lr_mul"]}]
    for group in groups:
        group["initial_lr"] = group["lr"]
    kind = torch.optim.AdamW if train["G_optimizer_type"] == "adamw" else torch.optim.Adam
    return kind(groups, lr=rate, betas=tuple(train["G_optimizer_betas"]), weight_decay=train["G_optimizer_wd"])


def set_learning_rate(optimizer: torch.optim.Optimizer, iteration: int, train: Mapping[str, Any]) -> None:
    """Give each group its rate for ``iteration`` (from 1)."""
    multipliers = [1.0] if len(optimizer.param_groups) == 1 else [1.0, train["fix_lr_mul"]]
    for group, multiplier in zip(optimizer.param_groups, multipliers, strict=True):
        group["initial_lr"] = train["G_optimizer_lr"] * multiplier
        group["lr"] = learning_rate(group["initial_lr"], iteration, train)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged parameters towards the network's: ``E = decay E + (1 - decay) G``."""
    ours = [p.detach() for p in average.parameters()]
    theirs = [p.detach() for p in network.parameters()]
    torch._foreach_mul_(ours, decay)
    torch._foreach_add_(ours, theirs, alpha=1.0 - decay)
