"""Loss and metrics: means over samples, so that a global batch's value is the mean of its samples', however shared."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from everyrank.apps.causal_sets.task import accuracy, compute_loss, manifold_accuracy, predict


def make_batch(num_graphs: int = 7) -> tuple[dict[str, torch.Tensor], SimpleNamespace]:
    generator = torch.Generator().manual_seed(1)
    output = {
        "dimension": torch.randn(num_graphs, 3, dtype=torch.float64, generator=generator, requires_grad=True),
        "manifold": torch.randn(num_graphs, 1, dtype=torch.float64, generator=generator, requires_grad=True),
    }
    dimension = torch.tensor([0, 2, -1, 1, -1, 0, 2])[:num_graphs]
    return output, SimpleNamespace(dimension=dimension, manifold=(dimension >= 0).long())


def part_of(output: dict[str, torch.Tensor], data: Any, indices: list[int]) -> tuple[dict[str, torch.Tensor], Any]:
    return {name: value[indices] for name, value in output.items()}, SimpleNamespace(
        dimension=data.dimension[indices], manifold=data.manifold[indices]
    )


@pytest.mark.parametrize("function", [compute_loss, accuracy, manifold_accuracy])
@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5, 6]], [[2], [4], [0, 1, 3, 5, 6]]])
def test_shares_of_a_batch_average_to_the_whole(function: Any, shares: list[list[int]]) -> None:
    """Also where a share holds nothing but orders without a dimension."""
    output, data = make_batch()
    parts = [function(*part_of(output, data, share)) * len(share) / 7 for share in shares]
    torch.testing.assert_close(sum(parts), function(output, data), rtol=0, atol=1e-15)


def test_loss_is_the_sum_of_two_cross_entropies() -> None:
    output, data = make_batch()
    told = data.dimension >= 0
    dimension = F.cross_entropy(output["dimension"][told], data.dimension[told]) * told.double().mean()
    manifold = F.binary_cross_entropy_with_logits(output["manifold"][:, 0], data.manifold.double())
    torch.testing.assert_close(compute_loss(output, data), dimension + manifold)
    compute_loss(output, data).backward()
    assert output["dimension"].grad is not None
    assert output["dimension"].grad[~told].abs().max() == 0, "no dimension is learned from orders that have none"
    ignorant = {"dimension": torch.zeros(7, 3), "manifold": torch.zeros(7, 1)}
    assert compute_loss(ignorant, data).item() == pytest.approx(5 / 7 * math.log(3) + math.log(2))


def test_metrics_count_right_answers() -> None:
    data = SimpleNamespace(dimension=torch.tensor([0, 1, -1, -1]), manifold=torch.tensor([1, 1, 0, 0]))
    output = {
        "dimension": torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [9.0, 0, 0], [0, 9.0, 0]]),
        "manifold": torch.tensor([[1.0], [1.0], [-1.0], [1.0]]),
    }
    assert [answer.tolist() for answer in predict(output)] == [[0, 0, 0, 1], [True, True, False, True]]
    assert accuracy(output, data).item() == 0.5, "the second has a wrong dimension, the fourth is no sprinkling"
    assert manifold_accuracy(output, data).item() == 0.75
