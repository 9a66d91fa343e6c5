"""Train whatever ``app`` configures: the sections of ``TrainerDDP`` and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everyrank import TrainerDDP, hash_weights, join, read_app_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Train:
    """Prepare the data that ``app.data`` names, train, and test."""

    def run(self, cfg: DictConfig) -> dict[str, Any]:
        """Run on this rank.

        Returns:
            The final losses, and a hash of the weights.
        """
        with join(**cfg.distributed) as world:
            trainer = TrainerDDP(config=read_app_config(cfg), world=world)
            train_history, val_history = trainer.run_training()
            trainer.run_test()
            last = {"train": train_history[-1:], "validation": val_history[-1:]}
            return {
                "weights": hash_weights(trainer.module),
                **{name: rows[0] if rows else None for name, rows in last.items()},
            }
