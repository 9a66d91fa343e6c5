"""The folder of a run: the same command finds the same folder again.

The name is the app's name and a hash of the app's settings, so it does not change with the driver, the number of ranks
or the machine: whatever launches the command again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from everyrank.config import plain_yaml
from everyrank.errors import ConfigError, UserError
from everyrank.runtime.run_lock import RunLock, is_locked

_MAX_COPIES = 1000
_LOCK = ".lock"
_WRITTEN_FIRST = {_LOCK, "logs", "run.yaml", "job.sh", "watch"}  # before a rank begins


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
        name: Its name below ``env.output_dir``.
        path: Absolute path.
        is_new: It must not exist yet.
        is_asked_for: It was named by its path, so no other will do.
        shared: Several launching processes use it at once (one a node), so none holds it alone.
    """

    name: str
    path: str
    shared: bool
    is_new: bool = False
    is_asked_for: bool = False

    @classmethod
    def choose(cls, resolved: Mapping[str, Any], shared: bool) -> RunFolder:
        """Name the folder of a resolved configuration; nothing is created.

        A folder that another launch is using, or that ``resume=never`` must not touch, is passed over for the next
        one: ``name-2``, ``name-3`` ...
        """
        run, env = resolved["run"], resolved["env"]
        base = _plain("run.name", run["name"]) if run["name"] else default_name(resolved["app"])
        if resolved.get("rehearse"):
            base += "-rehearsed"  # the real run must not go on from its checkpoints
        root = os.path.abspath(env["output_dir"])
        if run["dir"]:
            return cls(os.path.basename(run["dir"]), os.path.abspath(run["dir"]), shared, is_asked_for=True)
        if shared:
            return cls(base, os.path.join(root, base), True)
        for copy in range(1, _MAX_COPIES):
            name = base if copy == 1 else f"{base}-{copy}"
            path = os.path.join(root, name)
            is_new = resolved["resume"] == "never"
            if not is_locked(Path(path, _LOCK)) and not (is_new and os.path.exists(path)):
                return cls(name, path, False, is_new)
        raise ConfigError(f"there are {_MAX_COPIES} runs named {base} in {root}. Fix: set another run.name.")

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Create the folder and hold its lock, which the kernel releases if this process dies.

        After a mistake of the user's, with which no rank began, what was created is removed again.

        Yields:
            False if another launch has taken it since it was chosen: then choose again.

        Raises:
            ConfigError: The folder cannot be used, or is one that was asked for by path and is in use.
        """
        path = Path(self.path)
        created = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            if self.is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            (path / "logs").mkdir(parents=True, exist_ok=True)
            lock = None if self.shared else RunLock(path, _LOCK)
        except OSError as error:
            if self.is_new and isinstance(error, FileExistsError):
                yield False
                return
            raise ConfigError(
                f"the run's folder {self.path} cannot be used: {error.strerror}. Fix: set run.dir, or env.output_dir, "
                "to a folder that can be written to."
            ) from error
        if lock is not None and lock.holder:
            if self.is_asked_for:
                raise ConfigError(
                    f"run.dir={self.path} was set, but that folder is in use by {lock.holder}. Fix: wait until that "
                    "run ends, or set another run.dir."
                )
            yield False
            return
        try:
            yield True
        except UserError:
            with contextlib.suppress(OSError):  # another node has taken it away as well, or uses it by now
                is_ours = {entry.name for entry in path.iterdir()} <= _WRITTEN_FIRST
                if path in created and is_ours and not any((path / "logs").iterdir()):
                    shutil.rmtree(path, ignore_errors=True)
                    for folder in created[1:]:
                        folder.rmdir()
            raise
        finally:
            if lock is not None:
                lock.release()

    def differences(self, resolved: Mapping[str, Any]) -> list[str]:
        """Settings that make a result, and that this folder was used with before where they were others."""
        try:
            with open(os.path.join(self.path, "run.yaml"), encoding="utf-8") as file:
                before = dict(_settings(plain_yaml.load(file)))
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            return []
        now = dict(_settings(resolved))
        return [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in _differing(before, now)]

    def notices(self, resolved: Mapping[str, Any]) -> list[str]:
        """What is to be said of an earlier run that used this folder."""
        lines = [f"{self.path} was used with other settings: {line}" for line in self.differences(resolved)]
        if resolved["resume"] == "never" and os.path.exists(os.path.join(self.path, "run.yaml")):
            lines.append(
                f"resume=never was set, but {self.path} was used before: a trainer sets its run aside, the rest stays"
            )
        return lines

    def result(self) -> Any:
        """What the app returned on rank 0, or None."""
        try:
            with open(os.path.join(self.path, "result.json"), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return None


def keep_apart(resolved: Mapping[str, Any], seen: dict[str, Mapping[str, Any]]) -> None:
    """Look whether a job of a multirun uses the folder of an earlier one; with the same settings that is said.

    Args:
        resolved: The job's configuration.
        seen: The settings of the earlier jobs, by folder; this one's are added.

    Raises:
        ConfigError: An earlier job uses the folder with other settings.
    """
    run, now = resolved["run"], dict(_settings(resolved))
    if resolved["resume"] == "never" and not run["dir"]:
        return  # each makes a new one
    path = RunFolder.choose(resolved, shared=True).path
    if path not in seen:
        seen[path] = now
    elif other := _differing(seen[path], now):
        raise ConfigError(
            f"jobs of this multirun share the folder {path} with other settings ({', '.join(other)}), so one would go "
            f"on from another's files. Fix: name the setting in run.name: 'run.name=NAME-${{{other[0]}}}'."
        )
    else:
        print(f"notice: jobs of this multirun share {path}: each goes on where the one before ended", file=sys.stderr)


def default_name(app: Mapping[str, Any]) -> str:
    """``<app name>-<hash of its settings>``."""
    digest = hashlib.blake2b(json.dumps(app, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
    name = _plain("app.name", app["name"]) if app.get("name") else str(app["_target_"]).rpartition(".")[2]
    return f"{name}-{digest}"


def _plain(key: str, name: Any) -> str:
    """Return a name that is one folder's.

    Raises:
        ConfigError: It would lead elsewhere.
    """
    text = str(name)
    if "/" in text or "\0" in text or text.startswith("."):
        raise ConfigError(
            f"{key}={text!r} was set, but it names the run's folder: no / in it, and no dot at its start. Fix: set a "
            "plain name, or run.dir to a path."
        )
    return text


def _settings(resolved: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a result comes from: not how, where and on how many ranks it is made."""
    yield from _flat(resolved["app"], "app.")
    yield from _flat((resolved.get("env") or {}).get("variables") or {}, "env.variables.")
    if resolved.get("rehearse"):
        yield "rehearse", resolved["rehearse"]


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _flat(values: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
