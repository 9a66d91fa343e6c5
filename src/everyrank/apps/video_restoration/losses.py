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


class RestorationLoss:
    """The loss that a ``train`` section describes, weight included.

    Args:
        kind: ``l1``, ``l2``, ``charbonnier`` or ``ssim``.
        weight: Factor on it.
        eps: Added under the root of the Charbonnier loss.
    """

    def __init__(self, kind: str, weight: float = 1.0, eps: float = 1e-9) -> None:
        self.kind, self.weight, self.eps = kind, weight, eps

    def __call__(self, restored: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of restored clips (B, T, 3, H, W) beside the sharp ones, ``batch["H"]``; it is in float32."""
        losses: dict[str, Loss] = {
            "l1": F.l1_loss,
            "l2": F.mse_loss,
            "ssim": lambda restored, sharp: 1.0 - ssim(restored.flatten(0, 1), sharp.flatten(0, 1), peak=1.0).mean(),
            "charbonnier": lambda restored, sharp: charbonnier(restored, sharp, self.eps),
        }
        with torch.autocast(restored.device.type, enabled=False):
            return self.weight * losses[self.kind](restored.float(), batch["H"])
