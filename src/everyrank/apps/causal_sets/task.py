"""The task: tell a sprinkling's dimension, and a sprinkling from an order that is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from everyrank.apps.causal_sets.dataset import IGNORED

if TYPE_CHECKING:
    from torch_geometric.data import Batch

Output = Mapping[str, Tensor]
"""What the network says of B graphs: ``dimension`` [B, classes] and ``manifold`` [B, 1], both before the softmax."""


def compute_loss(output: Output, data: Batch) -> Tensor:
    """Return the mean over graphs of both cross-entropies, a scalar.

    An order without a dimension adds nothing to the first. It is counted in the mean all the same: only so is the loss
    of a global batch the mean of its samples' losses, whichever ranks hold them.
    """
    dimension = F.cross_entropy(output["dimension"], data.dimension, ignore_index=IGNORED, reduction="sum")
    logit = output["manifold"].squeeze(1)
    manifold = F.binary_cross_entropy_with_logits(logit, data.manifold.to(logit.dtype), reduction="sum")
    return (dimension + manifold) / len(logit)


def predict(output: Output) -> tuple[Tensor, Tensor]:
    """Return the network's answers: index of the dimension [B], and whether the order is manifold-like [B]."""
    return output["dimension"].argmax(dim=1), output["manifold"].squeeze(1) > 0


def accuracy(output: Output, data: Batch) -> Tensor:
    """Return the share of graphs on which all that was asked is answered rightly, a scalar."""
    dimension, manifold = predict(output)
    told = (dimension == data.dimension) | (data.dimension == IGNORED)
    return (told & (manifold == data.manifold.bool())).double().mean()


def manifold_accuracy(output: Output, data: Batch) -> Tensor:
    """Return the share of graphs that are rightly called manifold-like or not, a scalar."""
    return (predict(output)[1] == data.manifold.bool()).double().mean()
