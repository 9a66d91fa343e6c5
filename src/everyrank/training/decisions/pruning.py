"""Optuna trials in a distributed run: rank 0 reports, its decision is broadcast, and all ranks stop together.

The usual arrangement for a study over several ranks is that rank 0 runs the study and passes its trial, while the other
ranks call the same objective as often with ``trial=None``::

    if world.is_main:
        study.optimize(objective, n_trials=20)
    else:
        for _ in range(20):
            with contextlib.suppress(optuna.TrialPruned):
                objective(None)

Suggestions must reach all ranks too, for example by
``lr = everyrank.broadcast_decision(trial.suggest_float("lr", 1e-4, 1e-1, log=True) if trial else None)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everyrank.runtime.agreement import agree
from everyrank.runtime.world import World
from everyrank.training.config_data import ValidationConfig


def has_trial(world: World, trial: Any) -> bool:
    """Tell whether any rank was given a trial: rank 0's counts. Collective."""
    return agree(lambda: trial is not None, on=0)


def report_and_prune(world: World, trial: Any, row: Mapping[str, Any], config: ValidationConfig) -> None:
    """Report a result to the trial and stop on all ranks if it is to be pruned. Collective.

    Args:
        world: The joined world.
        trial: Rank 0's trial; what the other ranks pass is ignored.
        row: A row of the history: of an epoch, whose validation loss is reported (without validation, its training
            loss); or of a validation, if the run validates after a number of steps, by which it is then counted.
        config: The ``validation`` section.

    Raises:
        optuna.TrialPruned: On every rank, at the same step.
    """
    unit = "epoch" if config.every_n_steps is None else "step"
    if unit == "step" and "val_loss" not in row:
        return
    value, number = float(row.get("val_loss", row.get("train_loss"))), int(row[unit])

    def decide() -> bool:
        trial.report(value, number)
        return bool(trial.should_prune())

    if agree(decide, on=0):
        import optuna

        raise optuna.TrialPruned(f"pruned after {unit} {number} at {value:.6g}")
