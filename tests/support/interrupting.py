"""A dataset during which rank 1 is told to stop, once, in the middle of the second epoch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

import everyrank
from everyrank.certification.data import Regression

_AFTER = 80  # samples that rank 1 of 2 has read: 52 a training epoch, and its part of the validation


class Interrupting(Regression):
    """Sends SIGTERM to its own rank when a sample is read, unless the file ``mark`` says that this was done."""

    def __init__(self, num_samples: int, delay_s: float, mark: str) -> None:
        super().__init__(num_samples, delay_s=0.0)
        self.mark, self.num_read = Path(mark), 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_read += 1
        if self.num_read == _AFTER and everyrank.current_world().rank == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)
