"""A run that stands still in the middle of an epoch until it is killed: ``python live.py FOLDER``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tiny

from everyrank import TrainerDDP


class Slow(tiny.Dataset):
    """The 60th sample that is read never comes."""

    num_read = 0

    def __len__(self) -> int:
        return 103

    def __getitem__(self, index: int) -> object:
        self.num_read += 1
        if self.num_read == 60:
            print("stands", flush=True)
            while True:
                time.sleep(1)
        return tiny.make_data()[index]


if __name__ == "__main__":
    trainer = TrainerDDP(config=tiny.make_config(Path(sys.argv[1]), checkpoint_every_steps=2, ledger=True))
    trainer.prepare_dataloaders(train_dataset=Slow())
    trainer.run_training()
