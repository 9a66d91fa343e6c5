"""While a checkpoint is written, training goes on: it waits only for the copy out of the model."""

from __future__ import annotations

from pathlib import Path

import hurt_run
import torch

import everyrank
from everyrank.checkpoint.checkpointer import read_checkpoint

PRELOAD = ("everyrank.apps.train", "hurt_run")
CHANGES = {"checkpoint_every_steps": 4, "keep_last": 20}


def test_steps_are_taken_while_the_disk_does_not_answer(tmp_path: Path) -> None:
    stuck, usual = tmp_path / "stuck", tmp_path / "usual"
    results = everyrank.launch(hurt_run.train_on_a_stuck_disk, stuck, CHANGES, preload=PRELOAD)
    assert results[0][0] == [True], "training came to step 8 while the checkpoint of step 4 was being written"
    everyrank.launch(hurt_run.train, usual, preload=PRELOAD, kwargs={"changes": CHANGES})
    names = sorted(path.name for path in (usual / "checkpoints").glob("step-*"))
    assert "step-00000004" in names
    for name in names:  # and the later steps did not write into the copy
        mine, theirs = (read_checkpoint(run / "checkpoints" / name) for run in (stuck, usual))
        for group, tensors in theirs.tensors.items():
            assert all(torch.equal(mine.tensors[group][key], value) for key, value in tensors.items())
