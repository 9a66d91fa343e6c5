"""The certificate's own data and model: small, in float64, and slow enough to be killed in the middle."""

from __future__ import annotations

import time

import torch
from torch.utils.data import Dataset


class Regression(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A noisy linear map of 8 inputs to 1 output.

    Args:
        num_samples: Number of samples.
        delay_s: Seconds that reading one sample takes, so that a signal finds the training in the middle of a step.
    """

    def __init__(self, num_samples: int = 103, delay_s: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(num_samples, 8, generator=generator, dtype=torch.float64)
        noise = 0.1 * torch.randn(num_samples, 1, generator=generator, dtype=torch.float64)
        self.targets = self.inputs.sum(1, keepdim=True) + noise
        self.delay_s = delay_s

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.delay_s)
        return self.inputs[index], self.targets[index]


def network() -> torch.nn.Module:
    """Two layers, 8 to 16 to 1, without dropout or batch statistics."""
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def mean_squared_error(output: torch.Tensor, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean over the samples of the squared error."""
    return (output - data[1]).square().mean()


def apply_model(model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The model sees the inputs only."""
    output: torch.Tensor = model(data[0])
    return output
