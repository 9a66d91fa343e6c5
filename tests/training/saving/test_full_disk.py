"""A disk that is full while a run saves in the background: said at the next save, by all ranks; nothing is lost."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import everyrank
from conftest import RunCli
from everyrank.checkpoint.folder import list_checkpoints


def test_a_full_disk_ends_the_run_at_the_next_save_on_all_ranks(tmp_path: Path) -> None:
    """The disk is full when the checkpoint of step 2 is whole: the save at 4 fails, and that at 6 says so."""

    def on_rank(folder: Path) -> tuple[str, int]:
        import resource

        import tiny

        import everyrank

        def fill_the_disk(saved: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

        with everyrank.join(backend="gloo") as world:
            config = tiny.make_config(
                folder, num_epochs=3, checkpoint_every_steps=2, log_every_steps=100, after_save=fill_the_disk
            )
            trainer = everyrank.TrainerDDP(config=config, world=world)
            trainer.prepare_dataloaders(train_dataset=tiny.make_data(103))
            try:
                trainer.run_training()
                said = "nothing"
            except everyrank.errors.CheckpointError as error:
                said = str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return said, trainer.step

    results = everyrank.launch(on_rank, tmp_path, nproc_per_node=2)
    for said, step in results:
        assert "could not be written" in said
        assert "File too large" in said
        assert step == 6
    whole = list_checkpoints(tmp_path / "checkpoints")
    assert [(info.step, info.verified) for info in whole] == [(2, True)]


def test_a_disk_that_is_full_under_the_records_of_a_run_is_one_message(run_cli: RunCli, tmp_path: Path) -> None:
    """Rank 0 alone writes history and ledger; all ranks end, and no checkpoint is lost."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        endless = ("app.training.num_epochs=1000", "app.training.checkpoint_every_steps=1000")
        done = run_cli("driver=torchrun", "app=certify", f"run.dir={folder}/run", "app.data.kwargs.delay_s=0", *endless)
        assert done.returncode in (1, 2), done.stderr  # 1 where the ranks cannot even write down why they end
        assert re.search(r"(cannot|could not) be written.*No space left on device", done.stderr)
        assert "Fix: make room" in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        infos = list_checkpoints(folder / "run" / "checkpoints")
        assert all(info.verified for info in infos)
    finally:
        subprocess.run(["umount", folder], check=True)
