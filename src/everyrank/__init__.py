"""everyrank: one PyTorch training program, unchanged, on every rank under every launcher, with the same result.

Public names are loaded when they are first used, so that ``import everyrank`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "BarrierTimeoutError": "errors",
    "CheckpointError": "errors",
    "Checkpointer": "checkpoint.checkpointer",
    "ConfigError": "errors",
    "DefaultEarlyStopping": "training.early_stopping",
    "DefaultTester": "training.evaluation",
    "DefaultValidator": "training.evaluation",
    "EveryrankError": "errors",
    "GNNModel": "models.gnn",
    "GlobalBatchSampler": "data.sampler",
    "GlobalOrder": "data.order",
    "ProcessEnvironment": "runtime.environment",
    "RankFailedError": "errors",
    "TrainerDDP": "training.trainer",
    "UserError": "errors",
    "World": "runtime.world",
    "barrier": "runtime.collectives",
    "broadcast_decision": "runtime.collectives",
    "cleanup_ddp": "runtime.process_group",
    "current_world": "runtime.process_group",
    "detect": "runtime.environment",
    "gather_objects": "runtime.collectives",
    "get_loader": "config.yaml_loader",
    "get_logger": "runtime.logs",
    "initialize_ddp": "runtime.process_group",
    "join": "runtime.process_group",
    "launch": "drivers.function",
    "main_first": "runtime.collectives",
    "monitored_barrier": "runtime.collectives",
    "rank_zero_only": "runtime.collectives",
    "reduce_mean": "runtime.collectives",
    "reduce_sum": "runtime.collectives",
    "setup_logging": "runtime.logs",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        from everyrank.errors import did_you_mean

        raise AttributeError(f"module 'everyrank' has no attribute {name!r}.{did_you_mean(name, _EXPORTS)}")
    value = getattr(importlib.import_module(f"everyrank.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from everyrank.checkpoint.checkpointer import Checkpointer
    from everyrank.data.order import GlobalOrder
    from everyrank.data.sampler import GlobalBatchSampler
    from everyrank.runtime.environment import ProcessEnvironment, detect
    from everyrank.runtime.process_group import cleanup_ddp, current_world, initialize_ddp, join
    from everyrank.runtime.world import World
