"""The house: its public names, what an import costs, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import everyrank
from conftest import ROOT

SOURCE = ROOT / "src" / "everyrank"
PUBLIC = [
    "BarrierTimeoutError",
    "CheckpointError",
    "Checkpointer",
    "ConfigError",
    "DefaultEarlyStopping",
    "DefaultTester",
    "DefaultValidator",
    "EveryrankError",
    "GNNModel",
    "GlobalBatchSampler",
    "GlobalOrder",
    "GlobalSampler",
    "Preempted",
    "PreemptionWatch",
    "ProcessEnvironment",
    "RankFailedError",
    "TrainerDDP",
    "UserError",
    "World",
    "__version__",
    "barrier",
    "broadcast_decision",
    "cleanup_ddp",
    "current_world",
    "detect",
    "gather_objects",
    "get_loader",
    "get_logger",
    "initialize_ddp",
    "join",
    "launch",
    "main_first",
    "monitored_barrier",
    "rank_zero_only",
    "reduce_mean",
    "reduce_sum",
    "setup_logging",
]
MAY_IMPORT = {
    "runtime": {"runtime"},
    "config": {"config"},
    "data": {"data", "runtime"},
    "checkpoint": {"checkpoint", "runtime"},
    "models": {"models", "config"},
    "drivers": {"drivers", "config"},
    "training": {"training", "data", "checkpoint", "runtime", "models", "config"},
    "apps": {"apps", "training", "data", "checkpoint", "runtime", "models", "config"},
}
EVERYBODY = {"errors", "interfaces", "lifetime"}


def test_public_names_are_locked_and_exist() -> None:
    assert sorted(everyrank.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(everyrank, name) is not None


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'TrainerDDP'"):
        _ = everyrank.TrainerDpd  # type: ignore[attr-defined]


def test_importing_everyrank_imports_no_dependency() -> None:
    code = "import sys, everyrank; print(sorted({'torch', 'numpy', 'hydra', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows(room: str) -> None:
    wrong = []
    for path in sorted((SOURCE / room).rglob("*.py")):
        for module in _everyrank_imports(path):
            if module not in MAY_IMPORT[room] | EVERYBODY:
                wrong.append(f"{path.relative_to(SOURCE)} imports everyrank.{module}")
    assert wrong == []


def test_hydra_is_imported_by_the_command_line_alone() -> None:
    importers = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if any(name.split(".")[0] == "hydra" for name in _imports(path))
    }
    assert importers == {"cli.py"}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _everyrank_imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(path) if name.startswith("everyrank.")} - {"__version__"}
