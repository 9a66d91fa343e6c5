"""A disk that is full while a run saves in the background: said at the next save, by all ranks; nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import everyrank
from everyrank.checkpoint.folder import list_checkpoints


def test_a_full_disk_ends_the_run_at_the_next_save_on_all_ranks(tmp_path: Path) -> None:
    """The disk of rank 0, which writes, is full from step 3 on: the save at 4 fails, and that at 6 says so."""

    def on_rank(folder: Path) -> tuple[str, int]:
        import resource

        import tiny

        import everyrank

        num_calls = 0

        def full_from_step_3(output: Any, data: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 3 and world.is_main:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            return tiny.compute_loss(output, data)

        with everyrank.join(backend="gloo") as world:
            config = tiny.make_config(folder, num_epochs=3, checkpoint_every_steps=2, log_every_steps=100)
            config["criterion"] = full_from_step_3
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
