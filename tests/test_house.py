"""The house: its public names, what an import costs, and who may import whom."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import re
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
    "DataError",
    "DefaultEarlyStopping",
    "DefaultTester",
    "DefaultValidator",
    "DriverError",
    "EvaluationResult",
    "EveryrankError",
    "GNNModel",
    "GlobalBatchSampler",
    "GlobalPermutation",
    "GlobalSampler",
    "LaunchEnvironmentError",
    "NonFiniteLossError",
    "Preempted",
    "PreemptionWatch",
    "ProcessEnvironment",
    "ProcessGroupError",
    "RankFailedError",
    "RehearsalError",
    "RendezvousError",
    "SavedTraining",
    "SeededDataset",
    "TrainerConfig",
    "TrainerDDP",
    "UnwritableError",
    "UserError",
    "World",
    "__version__",
    "agree",
    "barrier",
    "broadcast_decision",
    "cleanup_ddp",
    "collate",
    "current_world",
    "detect",
    "did_you_mean",
    "exact",
    "gather_objects",
    "get_loader",
    "get_logger",
    "hash_weights",
    "initialize_ddp",
    "join",
    "launch",
    "load_model",
    "local_rank_argument",
    "main_first",
    "monitored_barrier",
    "rank_zero_only",
    "read_app_config",
    "read_config",
    "read_ledger",
    "reduce_mean",
    "reduce_sum",
    "schema",
    "setup_logging",
    "strip_legacy_arguments",
]
# From the ground up: a room imports itself and the rooms before it.
FLOORS = (
    "lint",
    "launch_env",
    "rehearsal",
    "config",
    "models",
    "rendezvous",
    "runtime",
    "diagnosis",
    "data",
    "checkpoint",
    "elastic",
    "program",
    "training",
    "apps",
    "startup",
    "worker",
    "drivers",
    "reporting",
    "certification",
    "doctor",
    "cli",
)
EVERYBODY = {"errors", "__version__", "modules_in_use"}
MOST_FILES = 16  # of one folder, besides its __init__; more of them and nobody sees what is where
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60  # a function's docstring is not counted


def test_public_names_are_locked_and_exist() -> None:
    assert sorted(everyrank.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(everyrank, name) is not None


def test_type_checkers_are_told_the_same_names() -> None:
    told = _public_homes()
    assert sorted(told) == sorted(set(PUBLIC) - {"__version__"})
    for name, module in told.items():
        home = importlib.import_module(module)
        assert getattr(everyrank, name) is getattr(home, name, home)


def test_apps_import_the_public_names_alone() -> None:
    """As a program of a user does: the shipped apps show that the public names are enough."""
    wrong = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for app in (SOURCE / "apps").iterdir()
        for path in (app.rglob("*.py") if app.is_dir() else [app])
        for name in sorted(_imports(path))
        if name.split(".")[0] == "everyrank"
        and name.removeprefix("everyrank.") not in {*PUBLIC, "everyrank"}
        and not f"{name}.".startswith(f"everyrank.apps.{app.stem}.")
    ]
    assert wrong == []


def test_there_is_one_training_loop() -> None:
    """One place calls backward on a loss: the trainer's step."""
    calling = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    }
    assert calling == {"training/step.py"}


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'TrainerDDP'"):
        _ = everyrank.TrainerDpd  # type: ignore[attr-defined]


def test_importing_everyrank_imports_no_dependency() -> None:
    code = "import sys, everyrank; print(sorted({'torch', 'numpy', 'hydra', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_normal_run_never_imports_the_rehearsal() -> None:
    """Of the rooms, only what starts processes may know of it, and those modules import it when one is asked for."""
    code = (
        "import sys, everyrank.worker, everyrank.cli.main, everyrank.cli.launching, everyrank.training.trainer;"
        "print([name for name in sys.modules if name.startswith('everyrank.rehearsal')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("room", FLOORS)
def test_arrows_run_down(room: str) -> None:
    below = set(FLOORS[: FLOORS.index(room) + 1])
    paths = sorted((SOURCE / room).rglob("*.py")) or [SOURCE / f"{room}.py"]
    wrong = [
        f"{path.relative_to(SOURCE)} imports everyrank.{module}"
        for path in paths
        for module in sorted(_everyrank_imports(path) - below - EVERYBODY)
    ]
    assert wrong == []


def test_every_room_has_its_floor() -> None:
    rooms = {path.parent.name for path in SOURCE.glob("*/*.py")}
    assert rooms <= set(FLOORS)
    table = re.findall(r"^\| `(\w+)(?:/|\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = [room for room in table if room in FLOORS]
    assert told == ["cli", "lint", *(room for room in reversed(FLOORS) if room not in ("cli", "lint"))]


def test_no_folder_and_no_file_outgrows_its_role() -> None:
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    crowded = {str(f.relative_to(SOURCE)): len(list(f.glob("*.py"))) - 1 for f in folders}
    assert {name: number for name, number in crowded.items() if number > MOST_FILES} == {}
    lengths = {str(p.relative_to(SOURCE)): len(p.read_text().splitlines()) for p in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_function_outgrows_a_screen() -> None:
    long = {
        f"{path.relative_to(SOURCE)}: {node.name}": length
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := _length(node)) > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_every_exception_that_a_public_name_promises_is_a_public_name_too() -> None:
    """Whoever is told of an exception can catch it."""
    tree = {node.name for node in ast.parse((SOURCE / "errors.py").read_text()).body if isinstance(node, ast.ClassDef)}
    assert tree <= set(everyrank.__all__)
    promised = set()
    for name in everyrank.__all__:
        public = getattr(everyrank, name)
        parts = [public, *(vars(public).values() if isinstance(public, type) else ())]
        for text in (inspect.getdoc(part) or "" for part in parts):
            _, _, raises = text.partition("Raises:\n")
            promised |= set(re.findall(r"^ {4}([A-Z]\w+):", raises.split("\n\n")[0], re.MULTILINE))
    assert {"ConfigError", "Preempted", "RankFailedError"} <= promised
    assert {name for name in promised if not hasattr(builtins, name)} <= set(everyrank.__all__)


def test_no_module_imports_itself_in_a_circle() -> None:
    imports = {_module(path): _modules_at_the_top(path) for path in SOURCE.rglob("*.py")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in sorted(imports.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(imports):
        visit(module, ())


def test_hydra_is_imported_by_the_command_line_alone() -> None:
    importers = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if any(name.split(".")[0] == "hydra" for name in _imports(path))
    }
    assert importers == {"cli/compose.py"}


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(function.body) > 1
    start = first.end_lineno if documented else function.lineno - 1
    head = first.lineno - function.lineno if documented else 0
    assert start is not None
    assert function.end_lineno is not None
    return function.end_lineno - start + head


def _module(path: Path) -> str:
    return ".".join(("everyrank", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def _modules_at_the_top(path: Path) -> set[str]:
    """The everyrank modules that importing this one imports."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("everyrank.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("everyrank."):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if _is_module(name)} or {str(node.module)}
    return found


def _is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _imports(path: Path) -> set[str]:
    """Everything that a file imports, also inside functions, and the modules of ours that its strings name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(r"everyrank((?:\.\w+)+)(?::\w+)?", node.value)
            if (
                named
                and (SOURCE / named[1].split(".")[1]).with_suffix(".py").exists()
                | (SOURCE / named[1].split(".")[1]).is_dir()
            ):
                names.add(f"everyrank{named[1]}")
    return names


def _everyrank_imports(path: Path) -> set[str]:
    """The rooms that a file imports from; a public name counts as the room it lives in."""
    homes = _public_homes()
    names = (name for name in _imports(path) if name.startswith("everyrank."))
    return {homes.get(name.split(".")[1], name).split(".")[1] for name in names}


@functools.cache
def _public_homes() -> dict[str, str]:
    """The module that each public name comes from, as type checkers are told; ``schema`` is a module itself."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        str(alias.asname): f"{node.module}.{alias.name}" if alias.name == "schema" else str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
