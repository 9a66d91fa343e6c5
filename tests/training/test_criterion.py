"""A criterion that is no mean over samples is found at the first step."""

from __future__ import annotations

from pathlib import Path

import numerics
import pytest
import tiny
import torch
from torch import Tensor

import everyrank
from everyrank.training.decisions.criterion import relation_to_parts


@pytest.mark.parametrize("size", [1, 2])
def test_a_sum_is_refused_and_a_mixture_is_told_of(tmp_path: Path, size: int) -> None:
    criteria = {
        "sum": numerics.summed,
        "contrastive": numerics.contrastive,
        "plain": tiny.compute_loss,
        "centred": numerics.Centred(),
    }
    for found in everyrank.launch(numerics.try_criteria, tmp_path, criteria, nproc_per_node=size):
        assert "criterion returns the sum of its samples' losses: " in found["sum"]
        assert "Fix: return the mean" in found["sum"]
        assert found["contrastive"]["step"] == 4
        assert found["calls"] == 4, "once for each of the four steps"
        for name, value in found["plain"]["weights"].items():
            difference = (value - found["centred"]["weights"][name]).abs().max()
            assert difference < 0.5, "the dropout is another: one number more is drawn in each step"
    told = "The criterion is no mean over samples"
    for name, times in (("contrastive", 1), ("plain", 0), ("centred", 0)):
        assert (tmp_path / name / "logs" / "rank-0.log").read_text().count(told) == times
    assert not list((tmp_path / "sum" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("num", [2, 3, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_means_and_sums_are_told_apart(num: int, dtype: torch.dtype) -> None:
    output = torch.randn(num, 2, generator=torch.Generator().manual_seed(num)).to(dtype)
    data = (torch.zeros(num), {"y": torch.randn(num, 2, generator=torch.Generator().manual_seed(1)).to(dtype)})

    def squares(output: Tensor, data: object) -> Tensor:
        return (output - data[1]["y"]).square().sum(1)  # type: ignore[index]

    cases = {
        "mean": lambda o, d: squares(o, d).mean() + 3,
        "sum": lambda o, d: squares(o, d).sum(),
        "neither": lambda o, d: torch.tensor(float(len(o) ** 2)),
    }
    for expected, function in cases.items():
        found = relation_to_parts(function, output, data)
        assert found is not None
        assert found[0] == expected, found
    assert relation_to_parts(cases["sum"], output * 0, (torch.zeros(num), {"y": output * 0}))[0] == "mean"  # type: ignore[index]
    assert relation_to_parts(cases["sum"], output[:1], data) is None


def test_a_metric_that_adds_up_is_refused_on_every_rank(tmp_path: Path) -> None:
    """Weighted by samples, as a mean is, a sum would say something else for each batch size."""
    for told in everyrank.launch(numerics.try_metrics, tmp_path, nproc_per_node=2):
        assert told.startswith("The metric 'near' adds up its samples: ")
        assert "Fix: return the mean" in told
