"""From one resolved configuration to a run: validate, name the folder, plan, launch, say how it ended."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from everyrank.cli.compose import compose
from everyrank.cli.program_arguments import SCRIPT_APP, name_script, script_words
from everyrank.cli.run_config import DistributedConfig, EnvConfig, RehearseConfig, RunConfig, check_resume
from everyrank.cli.run_folder import RunFolder, keep_apart
from everyrank.config import plain_yaml
from everyrank.config.resolve import import_object
from everyrank.config.schema import build
from everyrank.config.secrets import handed_over, hide
from everyrank.diagnosis.judge import conclude, last_block
from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.rank_files import write_whole
from everyrank.diagnosis.telling import describe
from everyrank.diagnosis.watch_config import WatchConfig
from everyrank.diagnosis.watcher import Watcher
from everyrank.drivers.driver import Driver, LaunchPlan, LaunchRequest
from everyrank.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, ConfigError, UserError, did_you_mean
from everyrank.program.command import Program, check_program, read_program
from everyrank.program.output import wait_for_logs

_LINES_SHOWN = 40


def launch_config(cfg: DictConfig, words: Sequence[str] | None = None, sys_path: Sequence[str] = ()) -> tuple[int, Any]:
    """Run the app of a composed configuration.

    Args:
        cfg: The configuration.
        words: A program of the user's own and its arguments, the ``app.command`` of ``app=script``.
        sys_path: Where this Python looks for modules, for a program: its own folder comes on top.

    Returns:
        The exit code, and the app's result if it ran in this process.

    Raises:
        UserError: The configuration, or the launch, is wrong; nothing was started.
    """
    resolved = _resolved(cfg, words)
    driver_config, driver_class = _driver(resolved["driver"])
    foreign = _foreign_world()
    shared = foreign is not None or driver_config.shares_folder
    asked, raw = dict(resolved["run"]), OmegaConf.to_container(cfg)
    while True:
        resolved["run"] = dict(asked)
        request, folder = _request(resolved, raw, shared, driver_class, tuple(sys_path))
        if foreign is not None and not driver_config.dry_run:
            print(f"notice: driver={driver_class.name} is not used: {foreign}", file=sys.stderr)
            return _run_here(resolved, folder, request, request.env)
        plan = driver_class(driver_config).plan(request)
        if driver_config.dry_run:
            print(plan.render(with_files=True), flush=True)
            return EXIT_OK, None
        with folder.held() as is_ours:
            if is_ours:
                return _carry_out(driver_class(driver_config), plan, request, folder, resolved)


def _carry_out(
    driver: Driver, plan: LaunchPlan, request: LaunchRequest, folder: RunFolder, resolved: dict[str, Any]
) -> tuple[int, Any]:
    """Carry a plan out in a folder that is held, and say how it ended."""
    # what a program prints is its own
    print(plan.render(with_files=False), file=sys.stderr if request.program is not None else sys.stdout, flush=True)
    for line in folder.notices(plain_yaml.load(request.config_text)):  # as it is written: without secrets
        print(f"notice: {line}", file=sys.stderr)
    _write_files(plan)
    if plan.driver == "local" and request.program is None:
        return _run_here(resolved, folder, request, {**request.env, **plan.env})
    with Watcher(folder.path, request.watch, plan.world_size or 0, shared=folder.shared) as watcher:
        outcome = driver.run(plan, request)
    if outcome.exit_code == EXIT_OK and (mismatch := watcher.silent_mismatch()):
        print(describe(mismatch, outcome.world_size), file=sys.stderr)
        return EXIT_FAILURE, folder.result()
    if request.program is not None:
        show = resolved["run"]["show"]
        return _finish_program(outcome, plan, show=show, folder=folder, num_oom_kills=watcher.num_oom_kills)
    return _finish(outcome, folder, watcher.num_oom_kills)


def check_jobs(argv: Sequence[str], words: Sequence[str] | None) -> None:
    """Look whether the jobs of a multirun get in each other's way, before the first is started.

    Args:
        argv: Their settings.
        words: A program of the user's own and its arguments.

    Raises:
        ConfigError: They share a folder with other settings.
    """
    seen: dict[str, Mapping[str, Any]] = {}
    for cfg in compose(argv):
        resolved = _resolved(cfg, words)
        name_script(resolved["app"])
        keep_apart(resolved, seen)


def plan_config(cfg: DictConfig) -> tuple[LaunchPlan, int]:
    """The plan of a composed configuration, for any machine: how many GPUs this one has does not matter.

    Returns:
        The plan and its world size.

    Raises:
        UserError: The configuration is wrong, or leaves the world size to the nodes.
    """
    resolved = _resolved(cfg)
    driver_config, driver_class = _driver(resolved["driver"])
    request, _ = _request(resolved, OmegaConf.to_container(cfg), True, driver_class, ())
    plan = driver_class(driver_config).plan(replace(request, device="cpu"))
    if plan.world_size is None:
        raise ConfigError(
            f"driver.nproc_per_node={driver_config.nproc_per_node} was set with driver.hosts: each host counts its "
            "own, so the number of ranks is not known here. Fix: give the plan a number, driver.nproc_per_node=8."
        )
    return plan, plan.world_size


def _request(
    resolved: dict[str, Any], raw: Any, shared: bool, driver_class: type[Driver], sys_path: tuple[str, ...]
) -> tuple[LaunchRequest, RunFolder]:
    """Check what is to run, name its folder in ``resolved``, and say what is to be launched."""
    _section(EnvConfig, resolved, "env")
    distributed = _section(DistributedConfig, resolved, "distributed")
    run, app = resolved["run"], resolved["app"]
    described = describe_app(app)
    _section(RunConfig, resolved, "run")
    name_script(app)
    if run["prefix"] == "auto" and not shared:  # the ranks may see a terminal that mpirun has made for them
        run["prefix"] = "rank" if sys.stdout.isatty() else "none"
    folder = RunFolder.choose(resolved, shared)
    run.update(name=folder.name, dir=folder.path)
    program = described.program(resolved)
    check_resume(resolved["resume"], is_program=program is not None)
    if program is not None:
        run["program"] = program.as_mapping()
        if not driver_class.is_elsewhere:
            check_program(program)
    variables = handed_over(resolved, raw)
    request = LaunchRequest(
        config_file=os.path.join(folder.path, "run.yaml"),
        config_text=plain_yaml.dump(hide(resolved, raw)),
        run_dir=folder.path,
        cwd=os.getcwd(),
        env={**variables, **_rehearsal(resolved, variables)},
        program=program,
        sys_path=tuple(os.path.abspath(p) if p == "" else p for p in sys.path) if program is None else sys_path,
        device=distributed.device,
        timeout_s=distributed.timeout_s,
        preload=tuple(app.get("preload") or ()),
        watch=_section(WatchConfig, resolved, "watch"),
    )
    return request, folder


def _resolved(cfg: DictConfig, words: Sequence[str] | None = None) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value was set. Set {missing[0]}=VALUE on the command line.")
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    variables = (resolved.get("env") or {}).get("variables")
    if isinstance(variables, dict):  # YAML reads 1 and true as a number and a truth value; a variable is text
        resolved["env"]["variables"] = {name: _as_text(value) for name, value in variables.items()}
    if words is not None:  # not before: neither Hydra nor OmegaConf is to read anything into them
        resolved["app"]["command"] = list(words)
    return resolved  # type: ignore[return-value]


def _as_text(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _section(schema: type[Any], resolved: dict[str, Any], name: str) -> Any:
    try:
        return build(schema, resolved[name], what=f"{name} section")
    except ConfigError as error:
        raise ConfigError(f"the {name} section is wrong:", [f"{name}.{p}" for p in error.problems]) from error


def _rehearsal(resolved: dict[str, Any], variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that make the ranks rehearse a GPU program, if they are to."""
    if build(RehearseConfig, {"rehearse": resolved.get("rehearse")}).rehearse is None:
        return {}
    from everyrank.rehearsal import environment

    return environment(1, {**os.environ, **variables})


def _driver(values: dict[str, Any]) -> tuple[Any, type[Driver]]:
    target = str(values["_target_"])
    try:
        driver_class = import_object(target)
    except ConfigError as error:
        raise ConfigError(f"driver._target_ {error} Fix: choose a driver with driver=NAME.") from error
    if not isinstance(driver_class, type) or not hasattr(driver_class, "config_type"):
        raise ConfigError(f"driver._target_={target} was set, but that is no driver. Fix: choose one with driver=NAME.")
    settings = {key: value for key, value in values.items() if key != "_target_"}
    return _section(driver_class.config_type, {"driver": settings}, "driver"), driver_class


def _foreign_world() -> str | None:
    """Which launcher started this process as one of several ranks, or None: such a process starts no other."""
    from everyrank.launch_env.detection import detect

    environment = detect()
    if environment.world_size <= 1:
        return None
    return (
        f"{environment.launcher} ({environment.detected_by}) started this process as rank "
        f"{environment.rank} of {environment.world_size}"
    )


def _run_here(
    resolved: dict[str, Any], folder: RunFolder, request: LaunchRequest, variables: Mapping[str, str]
) -> tuple[int, Any]:
    from everyrank.worker import run_app, run_program

    os.makedirs(folder.path, exist_ok=True)
    os.environ.update(variables)
    if request.program is not None:
        sys.path[:] = request.sys_path
        return run_program(resolved["run"]), None
    return run_app(OmegaConf.create(resolved))


def _write_files(plan: LaunchPlan) -> None:
    for path, content in plan.files.items():
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_whole(path, content)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}. Fix: make room, or set run.dir or env.output_dir to a "
                "folder that can be written to."
            ) from error


def _finish(outcome: Outcome, folder: RunFolder, num_oom_kills: int) -> tuple[int, Any]:
    code = outcome.exit_code
    if code == EXIT_PREEMPTED:
        print(f"preempted: a checkpoint is saved in {folder.path}; the same command goes on from it", file=sys.stderr)
    elif code == EXIT_BAD_INPUT and outcome.message:
        raise UserError(outcome.message)
    elif outcome.signum is not None and code != EXIT_OK:
        print(f"ended by {signal.Signals(outcome.signum).name}; no rank is left", file=sys.stderr)
    elif code != EXIT_OK:
        verdict = conclude(folder.path, outcome.failures, world_size=outcome.world_size, num_oom_kills=num_oom_kills)
        print(last_block(outcome, verdict), file=sys.stderr)
    return code, folder.result() if code == EXIT_OK else None


def _finish_program(
    outcome: Outcome, plan: LaunchPlan, *, show: str, folder: RunFolder, num_oom_kills: int
) -> tuple[int, Any]:
    """A program's end: its own exit code where there is one rank, else the verdict on all of them."""
    wait_for_logs(plan.log_files)
    if plan.driver == "local" and outcome.failures:
        code = outcome.failures[0].exit_code
        return code if code >= 0 else 128 - code, None
    if show != "all":
        for failure in outcome.failures:
            if failure.log_file and (show == "failed" or failure.rank != 0):
                _show_end(failure.rank, failure.log_file)
    return _finish(outcome, folder, num_oom_kills)


def _show_end(rank: int, log_file: str) -> None:
    with open(log_file, encoding="utf-8", errors="replace") as log:
        lines = deque(log, maxlen=_LINES_SHOWN)
    for line in lines:
        print(f"[rank {rank}] {line.rstrip()}", file=sys.stderr)


@dataclass(frozen=True)
class DescribedApp:
    """What can be told of an app without running it."""

    target: str
    has_command: bool

    def program(self, resolved: dict[str, Any]) -> Program | None:
        """The program of an app that has ``build_command``, else None.

        Raises:
            ConfigError: There is no program in the command.
        """
        if not self.has_command:
            return None
        if self.target == SCRIPT_APP:
            words = script_words(resolved["app"])
        else:
            from everyrank.worker import load_app

            words = load_app(self.target).build_command(OmegaConf.create(resolved))
        return read_program([str(word) for word in words], no_python=bool(resolved["app"].get("no_python")))


def describe_app(app: dict[str, Any]) -> DescribedApp:
    """Check that ``app._target_`` names a class that exists, without importing its module (which may import torch).

    Raises:
        ConfigError: There is no such module or class.
    """
    target = str(app.get("_target_") or "")
    module, _, name = target.rpartition(".")
    if not module:
        raise ConfigError(f"app._target_={target!r} was set; it is the full name of a class: package.module.Class.")
    try:
        names = _top_level_names(module)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"app._target_={target} was set, but {module} cannot be imported: {error}.") from error
    except SyntaxError as error:
        raise ConfigError(
            f"app._target_={target} was set, but {error.filename} does not parse: {error.msg} (line {error.lineno})."
        ) from error
    if names is None:
        return DescribedApp(target, has_command=False)
    if name not in names:
        raise ConfigError(f"app._target_={target} was set, but {module} has no {name!r}.{did_you_mean(name, names)}")
    return DescribedApp(target, has_command=_defines(module, name, "build_command"))


def _defines(module: str, name: str, method: str) -> bool:
    """Whether the class ``name`` of ``module`` has a method, its own, inherited, or of a class imported from elsewhere.

    Read from the source where it says so; imported where it does not (a base that is made by a call).
    """
    try:
        names = _top_level_names(module)
    except (ImportError, ValueError, SyntaxError):
        return False  # told when the app is imported
    node = (names or {}).get(name)
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        return _defines(node.module, alias.name, method)
    if isinstance(node, ast.ClassDef):
        if any(isinstance(n, ast.FunctionDef) and n.name == method for n in node.body):
            return True
        plain = [base.id for base in node.bases if isinstance(base, ast.Name)]
        if len(plain) == len(node.bases):
            return any(base in (names or {}) and _defines(module, base, method) for base in plain)
    if node is None:
        return False
    return hasattr(getattr(importlib.import_module(module), name, None), method)


def _top_level_names(module: str) -> dict[str, ast.AST] | None:
    """What a module defines and imports, by name, read from its source; None if it is not written in Python.

    Raises:
        ImportError: There is no such module.
        SyntaxError: It does not parse.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise ModuleNotFoundError(f"there is no module {module} here. Install it, or run from the folder that holds it")
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read(), spec.origin)
    names: dict[str, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.setdefault(node.name, node)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update({alias.asname or alias.name: node for alias in node.names})
        elif isinstance(node, ast.Assign):
            names.update({t.id: node for t in node.targets if isinstance(t, ast.Name)})
    return names
