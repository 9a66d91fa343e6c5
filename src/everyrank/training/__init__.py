"""The trainer: the step, evaluation, early stopping, history, progress.

Public names are loaded when they are first used: ``from everyrank.training import load_model``.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "DefaultEarlyStopping": "decisions.early_stopping",
    "DefaultTester": "evaluation.evaluators",
    "DefaultValidator": "evaluation.evaluators",
    "EvaluationResult": "evaluation.evaluators",
    "TrainerConfig": "config",
    "TrainerDDP": "trainer",
    "load_model": "saving.reload",
    "read_config": "config",
    "read_ledger": "saving.ledger",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
