"""everyrank: one PyTorch training program, unchanged, on every rank under every launcher, with the same result.

Public names are loaded when they are first used, so that ``import everyrank`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "BarrierTimeoutError": "errors",
    "CheckpointError": "errors",
    "Checkpointer": "checkpoint.checkpointer",
    "ConfigError": "errors",
    "DataError": "errors",
    "DefaultEarlyStopping": "training.decisions.early_stopping",
    "DefaultTester": "training.evaluation.evaluators",
    "DefaultValidator": "training.evaluation.evaluators",
    "DriverError": "errors",
    "EvaluationResult": "training.evaluation.evaluators",
    "EveryrankError": "errors",
    "GNNModel": "models.gnn",
    "GlobalBatchSampler": "data.sampler",
    "GlobalPermutation": "data.permutation",
    "GlobalSampler": "data.per_sample",
    "LaunchEnvironmentError": "errors",
    "NonFiniteLossError": "errors",
    "Preempted": "errors",
    "PreemptionWatch": "runtime.preemption",
    "ProcessEnvironment": "launch_env.detection",
    "ProcessGroupError": "errors",
    "RankFailedError": "errors",
    "RehearsalError": "errors",
    "RendezvousError": "errors",
    "SavedTraining": "training.saving.saved",
    "SeededDataset": "data.randomness",
    "TrainerConfig": "training.config",
    "TrainerDDP": "training.trainer",
    "UnwritableError": "errors",
    "UserError": "errors",
    "World": "runtime.world",
    "agree": "runtime.agreement",
    "barrier": "runtime.collectives",
    "broadcast_decision": "runtime.collectives",
    "cleanup_ddp": "runtime.process_group",
    "collate": "data.loader",
    "current_world": "runtime.process_group",
    "detect": "launch_env.detection",
    "did_you_mean": "errors",
    "exact": "data.exact",
    "gather_objects": "runtime.collectives",
    "get_loader": "config.yaml_loader",
    "get_logger": "runtime.logs",
    "hash_weights": "training.saving.state",
    "initialize_ddp": "runtime.process_group",
    "join": "runtime.process_group",
    "launch": "elastic.function",
    "load_model": "training.saving.reload",
    "local_rank_argument": "launch_env.legacy_arguments",
    "main_first": "runtime.collectives",
    "monitored_barrier": "runtime.collectives",
    "rank_zero_only": "runtime.collectives",
    "read_app_config": "training.config",
    "read_config": "training.config",
    "read_ledger": "training.saving.ledger",
    "reduce_mean": "runtime.collectives",
    "reduce_sum": "runtime.collectives",
    "schema": "config.schema",
    "setup_logging": "runtime.logs",
    "strip_legacy_arguments": "launch_env.legacy_arguments",
}

__all__ = ["__version__", *_EXPORTS]


def modules_in_use() -> set[str]:
    """The modules behind the public names that this process has imported."""
    return {f"{__name__}.{module}" for module in _EXPORTS.values()} & sys.modules.keys()


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        from everyrank.errors import did_you_mean

        raise AttributeError(f"module 'everyrank' has no attribute {name!r}.{did_you_mean(name, _EXPORTS)}")
    found = importlib.import_module(f"everyrank.{module}")
    value = getattr(found, name, found)  # schema is a module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:  # for type checkers and editors, which do not follow __getattr__; a test compares it with _EXPORTS
    from everyrank.checkpoint.checkpointer import Checkpointer as Checkpointer
    from everyrank.config import schema as schema
    from everyrank.config.yaml_loader import get_loader as get_loader
    from everyrank.data.exact import exact as exact
    from everyrank.data.loader import collate as collate
    from everyrank.data.per_sample import GlobalSampler as GlobalSampler
    from everyrank.data.permutation import GlobalPermutation as GlobalPermutation
    from everyrank.data.randomness import SeededDataset as SeededDataset
    from everyrank.data.sampler import GlobalBatchSampler as GlobalBatchSampler
    from everyrank.elastic.function import launch as launch
    from everyrank.errors import BarrierTimeoutError as BarrierTimeoutError
    from everyrank.errors import CheckpointError as CheckpointError
    from everyrank.errors import ConfigError as ConfigError
    from everyrank.errors import DataError as DataError
    from everyrank.errors import DriverError as DriverError
    from everyrank.errors import EveryrankError as EveryrankError
    from everyrank.errors import LaunchEnvironmentError as LaunchEnvironmentError
    from everyrank.errors import NonFiniteLossError as NonFiniteLossError
    from everyrank.errors import Preempted as Preempted
    from everyrank.errors import ProcessGroupError as ProcessGroupError
    from everyrank.errors import RankFailedError as RankFailedError
    from everyrank.errors import RehearsalError as RehearsalError
    from everyrank.errors import RendezvousError as RendezvousError
    from everyrank.errors import UnwritableError as UnwritableError
    from everyrank.errors import UserError as UserError
    from everyrank.errors import did_you_mean as did_you_mean
    from everyrank.launch_env.detection import ProcessEnvironment as ProcessEnvironment
    from everyrank.launch_env.detection import detect as detect
    from everyrank.launch_env.legacy_arguments import local_rank_argument as local_rank_argument
    from everyrank.launch_env.legacy_arguments import strip_legacy_arguments as strip_legacy_arguments
    from everyrank.models.gnn import GNNModel as GNNModel
    from everyrank.runtime.agreement import agree as agree
    from everyrank.runtime.collectives import barrier as barrier
    from everyrank.runtime.collectives import broadcast_decision as broadcast_decision
    from everyrank.runtime.collectives import gather_objects as gather_objects
    from everyrank.runtime.collectives import main_first as main_first
    from everyrank.runtime.collectives import monitored_barrier as monitored_barrier
    from everyrank.runtime.collectives import rank_zero_only as rank_zero_only
    from everyrank.runtime.collectives import reduce_mean as reduce_mean
    from everyrank.runtime.collectives import reduce_sum as reduce_sum
    from everyrank.runtime.logs import get_logger as get_logger
    from everyrank.runtime.logs import setup_logging as setup_logging
    from everyrank.runtime.preemption import PreemptionWatch as PreemptionWatch
    from everyrank.runtime.process_group import cleanup_ddp as cleanup_ddp
    from everyrank.runtime.process_group import current_world as current_world
    from everyrank.runtime.process_group import initialize_ddp as initialize_ddp
    from everyrank.runtime.process_group import join as join
    from everyrank.runtime.world import World as World
    from everyrank.training.config import TrainerConfig as TrainerConfig
    from everyrank.training.config import read_app_config as read_app_config
    from everyrank.training.config import read_config as read_config
    from everyrank.training.decisions.early_stopping import DefaultEarlyStopping as DefaultEarlyStopping
    from everyrank.training.evaluation.evaluators import DefaultTester as DefaultTester
    from everyrank.training.evaluation.evaluators import DefaultValidator as DefaultValidator
    from everyrank.training.evaluation.evaluators import EvaluationResult as EvaluationResult
    from everyrank.training.saving.ledger import read_ledger as read_ledger
    from everyrank.training.saving.reload import load_model as load_model
    from everyrank.training.saving.saved import SavedTraining as SavedTraining
    from everyrank.training.saving.state import hash_weights as hash_weights
    from everyrank.training.trainer import TrainerDDP as TrainerDDP
