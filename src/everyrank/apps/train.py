"""Train whatever ``app`` configures: the sections of ``TrainerDDP`` and nothing else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from everyrank.runtime.process_group import join
from everyrank.training.trainer import TrainerDDP

if TYPE_CHECKING:
    from omegaconf import DictConfig

_NOT_THE_TRAINERS = ("_target_", "name", "preload")


class Train:
    """Prepare the data that ``app.data`` names, train, and test."""

    def run(self, cfg: DictConfig) -> dict[str, Any]:
        """Run on this rank.

        Returns:
            The final losses, and a hash of the weights.
        """
        app = OmegaConf.to_container(cfg.app, resolve=True)
        assert isinstance(app, dict)
        config: dict[str, Any] = {str(key): value for key, value in app.items() if key not in _NOT_THE_TRAINERS}
        config["training"] = {"path": cfg.run.dir, "resume": cfg.get("resume", "auto"), **config["training"]}
        with join(**cfg.distributed) as world:
            trainer = TrainerDDP(config=config, world=world)
            train_loader, val_loader, test_loader = trainer.prepare_dataloaders()
            train_history, val_history = trainer.run_training(train_loader, val_loader)
            trainer.run_test(test_loader)
            digest = hashlib.sha256()
            for name, tensor in sorted(trainer.module.state_dict().items()):
                digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            return {"weights": digest.hexdigest(), "train": _last(train_history), "validation": _last(val_history)}


def _last(history: Any) -> Any:
    return history[-1] if len(history) else None
