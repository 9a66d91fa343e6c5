"""The average of the weights, also of weights in a narrow type."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from everyrank import TrainerDDP
from everyrank.training.config import EMAConfig
from everyrank.training.ema import WeightAverage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_average_moves_in_every_type(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    average = WeightAverage(model, EMAConfig(decay=0.999))
    expected = [p.detach().double().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 + torch.randn(parameter.shape, generator=generator).to(dtype) / 8)
        average.update()
        expected = [0.999 * e + 0.001 * p.detach().double() for e, p in zip(expected, model.parameters(), strict=True)]
    trained = [p.detach().clone() for p in model.parameters()]
    kept = {name: value.clone() for name, value in average.average.items()}
    for value, right in zip(average.average.values(), expected, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-4)
    with average.in_place_of_weights():
        for parameter, right in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), right.to(dtype))
    assert all(map(torch.equal, trained, [p.detach() for p in model.parameters()]))
    assert all(torch.equal(average.average[name], value) for name, value in kept.items())


def test_a_run_in_bfloat16_resumes_its_average_as_it_was(tmp_path: Path) -> None:
    averages = []
    for epochs in ((1, 2), (2,)):
        for num_epochs in epochs:
            config = tiny.make_config(
                tmp_path / str(len(epochs)), dtype="bfloat16", num_epochs=num_epochs, ema={"decay": 0.999}
            )
            trainer = TrainerDDP(config=config)
            trainer.prepare_dataloaders(train_dataset=tiny.make_data())
            trainer.run_training()
        assert trainer.ema is not None
        averages.append(trainer.ema.average)
    for name, value in averages[0].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, averages[1][name])
