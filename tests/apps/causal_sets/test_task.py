"""Loss and metrics: means over samples, so that a global batch's value is the mean of its samples', however shared."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from everyrank.apps.causal_sets.task import Output, accuracy, compute_loss, manifold_accuracy, probabilities


class Labels(SimpleNamespace):
    """A batch's labels, by name and by key as PyG's are."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return getattr(self, name)


def make_batch(num_graphs: int = 7) -> tuple[Output, Labels]:
    generator = torch.Generator().manual_seed(1)
    output = {
        name: torch.randn(num_graphs, width, dtype=torch.float64, generator=generator, requires_grad=True)
        for name, width in (("dimension", 4), ("curvature", 3), ("manifold", 1))
    }
    dimension = torch.tensor([0, 2, -1, 1, -1, 0, 3])[:num_graphs]
    curvature = torch.tensor([2, 0, -1, 1, -1, 1, 2])[:num_graphs]
    return output, Labels(dimension=dimension, curvature=curvature, manifold=(dimension >= 0).long())


def part_of(output: Output, data: Labels, indices: list[int]) -> tuple[Output, Labels]:
    labels = Labels(**{name: value[indices] for name, value in vars(data).items()})
    return {name: value[indices] for name, value in output.items()}, labels


@pytest.mark.parametrize("function", [compute_loss, accuracy, manifold_accuracy])
@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5, 6]], [[2], [4], [0, 1, 3, 5, 6]]])
def test_shares_of_a_batch_average_to_the_whole(function: Any, shares: list[list[int]]) -> None:
    """Also where a share holds nothing but orders without a dimension."""
    output, data = make_batch()
    parts = [function(*part_of(output, data, share)) * len(share) / 7 for share in shares]
    torch.testing.assert_close(sum(parts), function(output, data), rtol=0, atol=1e-15)


def test_loss_is_the_sum_of_three_cross_entropies() -> None:
    output, data = make_batch()
    told = data.manifold.bool()
    expected = F.binary_cross_entropy_with_logits(output["manifold"][:, 0], data.manifold.double())
    for name in ("dimension", "curvature"):
        expected = expected + F.cross_entropy(output[name][told], data[name][told]) * told.double().mean()
    torch.testing.assert_close(compute_loss(output, data), expected)
    compute_loss(output, data).backward()
    for name in ("dimension", "curvature"):
        gradient = output[name].grad
        assert gradient is not None
        assert gradient[~told].abs().max() == 0, "nothing is learned of what an order does not have"
    ignorant = {"dimension": torch.zeros(7, 4), "curvature": torch.zeros(7, 3), "manifold": torch.zeros(7, 1)}
    assert compute_loss(ignorant, data).item() == pytest.approx(5 / 7 * (math.log(4) + math.log(3)) + math.log(2))
    held = probabilities(ignorant)
    assert (held["dimension"][0, 0].item(), held["manifold"][0].item()) == (0.25, 0.5)
    assert held["curvature"].sum(dim=1).tolist() == pytest.approx([1.0] * 7)


def test_metrics_count_right_answers() -> None:
    data = Labels(
        dimension=torch.tensor([0, 1, 0, -1, -1]),
        curvature=torch.tensor([0, 0, 1, -1, -1]),
        manifold=torch.tensor([1, 1, 1, 0, 0]),
    )
    output = {
        "dimension": torch.tensor([[9.0, 0], [9.0, 0], [9.0, 0], [9.0, 0], [0, 9.0]]),
        "curvature": torch.tensor([[9.0, 0, 0]] * 5),
        "manifold": torch.tensor([[1.0], [1.0], [1.0], [-1.0], [1.0]]),
    }
    assert accuracy(output, data).item() == pytest.approx(0.4), "wrong: a dimension, a curvature, a manifold"
    assert manifold_accuracy(output, data).item() == pytest.approx(0.8)
