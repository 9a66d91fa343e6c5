"""The task: tell a sprinkling's dimension and curvature, and a sprinkling from an order that is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from everyrank.apps.causal_sets.dataset import IGNORED

if TYPE_CHECKING:
    from torch_geometric.data import Batch

HEADS = ("dimension", "curvature", "manifold")
"""What the network is asked about an order."""

Output = Mapping[str, Tensor]
"""What the network says of B graphs: ``dimension`` [B, classes], ``curvature`` [B, 3] and ``manifold`` [B, 1], before
the softmax and the logistic function."""


def compute_loss(output: Output, data: Batch) -> Tensor:
    """Return the mean over graphs of the three cross-entropies, a scalar.

    An order without a dimension adds nothing to the first two. It is counted in the mean all the same: only so is the
    loss of a global batch the mean of its samples' losses, whichever ranks hold them.
    """
    dimension = F.cross_entropy(output["dimension"], data.dimension, ignore_index=IGNORED, reduction="sum")
    curvature = F.cross_entropy(output["curvature"], data.curvature, ignore_index=IGNORED, reduction="sum")
    logit = output["manifold"].squeeze(1)
    manifold = F.binary_cross_entropy_with_logits(logit, data.manifold.to(logit.dtype), reduction="sum")
    return (dimension + curvature + manifold) / len(logit)


def probabilities(output: Output) -> dict[str, Tensor]:
    """Return what the network holds for how likely: ``dimension`` [B, classes], ``curvature`` [B, 3], ``manifold`` [B].

    In float64. The first two are conditional on the order being a sprinkling: they were trained on sprinklings alone.
    """
    return {
        "dimension": torch.softmax(output["dimension"].double(), dim=1),
        "curvature": torch.softmax(output["curvature"].double(), dim=1),
        "manifold": torch.sigmoid(output["manifold"].double().squeeze(1)),
    }


def accuracy(output: Output, data: Batch) -> Tensor:
    """Return the share of graphs on which all that was asked is answered rightly, a scalar."""
    right = (output["manifold"].squeeze(1) > 0) == data.manifold.bool()
    for name in ("dimension", "curvature"):
        right = right & ((output[name].argmax(dim=1) == data[name]) | (data[name] == IGNORED))
    return right.double().mean()


def manifold_accuracy(output: Output, data: Batch) -> Tensor:
    """Return the share of graphs that are rightly called manifold-like or not, a scalar."""
    return ((output["manifold"].squeeze(1) > 0) == data.manifold.bool()).double().mean()
