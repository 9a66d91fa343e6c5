"""Losses between restored and sharp clips, each the mean over the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everyrank.apps.video_restoration.metrics import ssim

Loss = Callable[[Tensor, Tensor], Tensor]


def charbonnier(restored: Tensor, sharp: Tensor, eps: float) -> Tensor:
    """Mean of ``sqrt(difference^2 + eps)``, a smooth absolute value (Charbonnier et al. 1994)."""
    return torch.sqrt((restored - sharp).square() + eps).mean()


def ssim_loss(restored: Tensor, sharp: Tensor) -> Tensor:
    """One minus the mean structural similarity of the frames of (B, T, C, H, W) in [0, 1]."""
    return 1.0 - ssim(restored.flatten(0, 1), sharp.flatten(0, 1), peak=1.0).mean()


def build_loss(train: Mapping[str, Any]) -> Loss:
    """Return the loss that the ``train`` section describes, weight included; it is computed in float32."""
    kind, weight, eps = train["G_lossfn_type"], train["G_lossfn_weight"], train["G_charbonnier_eps"]
    losses: dict[str, Loss] = {
        "l1": F.l1_loss,
        "l2": F.mse_loss,
        "ssim": ssim_loss,
        "charbonnier": lambda restored, sharp: charbonnier(restored, sharp, eps),
    }
    loss = losses[kind]
    return lambda restored, sharp: weight * loss(restored.float(), sharp)
