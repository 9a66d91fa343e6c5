"""A rank's step again, in one process: its loss and its gradient are bitwise those of the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import RunCli, cli_environment

_EVERYRANK = (sys.executable, "-m", "everyrank")
_PROGRAM = """
import os, torch, everyrank
from torch import nn

notes = open(f"notes/{os.getpid()}", "w", buffering=1)

class Samples(torch.utils.data.Dataset):
    def __len__(self): return 44
    def __getitem__(self, index): return torch.randn(6) + index  # random, but the same for the sample in each epoch

def build():
    layer = nn.Linear(6, 1)
    layer.weight.register_hook(lambda grad: print(grad.numpy().tobytes().hex(), file=notes))
    return nn.Sequential(nn.Dropout(0.5), layer)

def criterion(output, data):
    loss = output.square().mean()
    notes.write(f"{loss.item().hex()} ")
    return loss

with everyrank.join() as world:
    notes.write(f"{world.rank}\\n")
    trainer = everyrank.TrainerDDP(world=world, config={
        "model": {"type": build}, "criterion": criterion, "parallel": {},
        "training": {"path": "run", "num_epochs": 4, "batch_size": 4, "device": "cpu", "progress": "off",
                     "plots": False, "checkpoint_every_steps": 8, "keep_last": 10,
                     "optimizer_type": torch.optim.Adam,
                     "scheduler": {"type": torch.optim.lr_scheduler.StepLR, "kwargs": {"step_size": 2}}},
    })
    trainer.prepare_dataloaders(train_dataset=Samples(), val_dataset=Samples())
    trainer.run_training()
"""


def test_the_step_of_a_rank_is_done_again_bitwise(run_cli: RunCli, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (tmp_path / "train.py").write_text(_PROGRAM)
    run = run_cli("run", "driver=torchrun", "run.dir=run", "--", "train.py", program=_EVERYRANK)
    assert run.returncode == 0, run.stderr
    texts = [path.read_text().splitlines() for path in notes.iterdir()]
    # A validation writes losses alone, in front of the next step's.
    losses = {lines[0]: [" ".join(line.split()[-2:]) for line in lines[1:] if " " in line] for lines in texts}
    before = {path.name for path in notes.iterdir()}
    files = sorted(str(path) for path in (tmp_path / "run").rglob("*"))

    done = run_cli("replay", "run", "--rank", "1", "--step", "21", program=_EVERYRANK)
    assert done.returncode == 0, done.stderr
    assert "replay: from the checkpoint of step 18" in done.stdout
    assert "replay: 2 ranks go on to step 20" in done.stdout
    alone = next(t for p in notes.iterdir() if p.name not in before and len(t := p.read_text().splitlines()) == 2)
    step = losses["1"][20]
    words = alone[1].split()  # in a trainer's first step the criterion is looked at, too
    assert [words[0], words[-1]] == step.split()
    assert f"loss {float.fromhex(step.split()[0])!r}" in done.stdout
    assert sorted(str(path) for path in (tmp_path / "run").rglob("*")) == files, "the run is left as it was"

    command = [*_EVERYRANK, "replay", "run", "--rank", "1", "--step", "21", "--pdb"]
    orders = "p f'at step {replay.step} of rank {replay.rank}'\ncontinue\n"
    debugged = subprocess.run(
        command, cwd=tmp_path, env=cli_environment(), input=orders, capture_output=True, text=True, check=False
    )
    assert debugged.returncode == 0, debugged.stderr
    assert "at step 21 of rank 1" in debugged.stdout
    assert done.stdout.splitlines()[-1] in debugged.stdout, "the same loss and norm"

    for words, said in (
        (("run", "--rank", "2", "--step", "21"), "the run had ranks 0 to 1"),
        (("run", "--rank", "0", "--step", "3"), "no checkpoint is from before it"),
        (("notes", "--rank", "0", "--step", "3"), "it has no run.yaml"),
    ):
        refused = run_cli("replay", *words, program=_EVERYRANK)
        assert refused.returncode == 2
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr
