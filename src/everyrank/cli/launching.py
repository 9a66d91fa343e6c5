"""From one resolved configuration to a run: validate, name the folder, plan, launch, say how it ended."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import signal
import sys
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from everyrank.cli.run_config import DistributedConfig, EnvConfig, RunConfig
from everyrank.cli.run_folder import RunFolder
from everyrank.config.schema import build
from everyrank.diagnosis.failures import describe
from everyrank.diagnosis.outcome import Outcome
from everyrank.drivers.driver import Driver, LaunchPlan, LaunchRequest
from everyrank.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_PREEMPTED, ConfigError, UserError, did_you_mean


def launch_config(cfg: DictConfig) -> tuple[int, Any]:
    """Run the app of a composed configuration.

    Returns:
        The exit code, and the app's result if it ran in this process.

    Raises:
        UserError: The configuration, or the launch, is wrong; nothing was started.
    """
    resolved = _resolved(cfg)
    driver, app, env = resolved["driver"], resolved["app"], _section(EnvConfig, resolved, "env")
    distributed = _section(DistributedConfig, resolved, "distributed")
    _section(RunConfig, resolved, "run")
    driver_config, driver_class = _driver(driver)
    described = describe_app(app)
    foreign = _foreign_world()
    folder = RunFolder.choose(resolved, shared=foreign is not None or driver_config.shares_folder)
    resolved["run"].update(name=folder.name, dir=folder.path)
    final = OmegaConf.create(resolved)
    if foreign is not None and not driver_config.dry_run:
        print(f"notice: driver={driver_class.name} is not used: {foreign}", file=sys.stderr)
        return _run_here(final, folder, env.variables)
    request = _request(final, folder, env, distributed, described)
    plan = driver_class(driver_config).plan(request)
    print(plan.render(with_files=driver_config.dry_run), flush=True)
    if driver_config.dry_run:
        return EXIT_OK, None
    with folder.held():
        _write_files(plan)
        if plan.driver == "local" and request.command is None:
            return _run_here(final, folder, {**env.variables, **plan.env})
        return _finish(driver_class(driver_config).run(plan, request), folder)


def plan_config(cfg: DictConfig) -> tuple[LaunchPlan, int]:
    """The plan of a composed configuration, for any machine: how many GPUs this one has does not matter.

    Returns:
        The plan and its world size.

    Raises:
        UserError: The configuration is wrong, or leaves the world size to the nodes.
    """
    resolved = _resolved(cfg)
    env, distributed = _section(EnvConfig, resolved, "env"), _section(DistributedConfig, resolved, "distributed")
    driver_config, driver_class = _driver(resolved["driver"])
    folder = RunFolder.choose(resolved, shared=True)
    resolved["run"].update(name=folder.name, dir=folder.path)
    request = _request(OmegaConf.create(resolved), folder, env, distributed, describe_app(resolved["app"]))
    plan = driver_class(driver_config).plan(replace(request, device="cpu"))
    if plan.world_size is None:
        raise ConfigError(
            f"driver.nproc_per_node={driver_config.nproc_per_node} was set with driver.hosts: each host counts its "
            "own, so the number of ranks is not known here. Fix: give the plan a number, driver.nproc_per_node=8."
        )
    return plan, plan.world_size


def _request(
    final: DictConfig, folder: RunFolder, env: EnvConfig, distributed: DistributedConfig, described: DescribedApp
) -> LaunchRequest:
    return LaunchRequest(
        config_file=os.path.join(folder.path, "run.yaml"),
        config_text=OmegaConf.to_yaml(final),
        run_dir=folder.path,
        cwd=os.getcwd(),
        env=env.variables,
        command=described.command(final),
        device=distributed.device,
        timeout_s=distributed.timeout_s,
        preload=tuple(final.app.get("preload") or ()),
    )


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value was set. Set {missing[0]}=VALUE on the command line.")
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return resolved  # type: ignore[return-value]


def _section(schema: type[Any], resolved: dict[str, Any], name: str) -> Any:
    try:
        return build(schema, resolved[name], what=f"{name} section")
    except ConfigError as error:
        raise ConfigError(f"the {name} section is wrong:", [f"{name}.{p}" for p in error.problems]) from error


def _driver(values: dict[str, Any]) -> tuple[Any, type[Driver]]:
    module, _, name = str(values["_target_"]).rpartition(".")
    driver_class = getattr(importlib.import_module(module), name)
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


def _run_here(final: DictConfig, folder: RunFolder, variables: Any) -> tuple[int, Any]:
    from everyrank.worker import run_app

    os.makedirs(folder.path, exist_ok=True)
    os.environ.update(variables)
    return run_app(final)


def _write_files(plan: LaunchPlan) -> None:
    for path, content in plan.files.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}.part"
        with open(partial, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(partial, path)


def _finish(outcome: Outcome, folder: RunFolder) -> tuple[int, Any]:
    code = outcome.exit_code
    if code == EXIT_PREEMPTED:
        print(f"preempted: a checkpoint is saved in {folder.path}; the same command goes on from it", file=sys.stderr)
    elif code == EXIT_BAD_INPUT and outcome.message:
        raise UserError(outcome.message)
    elif outcome.signum is not None and code != EXIT_OK:
        print(f"ended by {signal.Signals(outcome.signum).name}; no rank is left", file=sys.stderr)
    elif code != EXIT_OK:
        print(describe(outcome), file=sys.stderr)
    return code, folder.result() if code == EXIT_OK else None


class DescribedApp:
    """What can be told of an app without running it."""

    def __init__(self, target: str, has_command: bool) -> None:
        self.target = target
        self.has_command = has_command

    def command(self, cfg: DictConfig) -> tuple[str, ...] | None:
        """The outside program of an app that has ``build_command``, else None."""
        if not self.has_command:
            return None
        from everyrank.worker import load_app

        return tuple(str(part) for part in load_app(self.target).build_command(cfg))


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
