"""The folder of a run: the same command finds the same folder again.

The name is the app's name and a hash of the app's settings, so it does not change with the driver, the number of ranks
or the machine: whatever launches the command again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_MAX_COPIES = 1000


@dataclass(frozen=True)
class RunFolder:
    """A run's folder.

    Attributes:
        name: Its name below ``env.output_dir``.
        path: Absolute path.
        shared: Several launching processes use it at once (one a node), so none holds it alone.
    """

    name: str
    path: str
    shared: bool

    @classmethod
    def choose(cls, resolved: Mapping[str, Any], shared: bool) -> RunFolder:
        """Name the folder of a resolved configuration; nothing is created.

        A folder that another launch is using, or that ``resume=never`` must not touch, is passed over for the next
        one: ``name-2``, ``name-3`` ...
        """
        run, env = resolved["run"], resolved["env"]
        base = run["name"] or default_name(resolved["app"])
        root = os.path.abspath(env["output_dir"])
        if run["dir"]:
            return cls(os.path.basename(run["dir"]), os.path.abspath(run["dir"]), shared)
        if shared:
            return cls(base, os.path.join(root, base), True)
        for copy in range(1, _MAX_COPIES):
            name = base if copy == 1 else f"{base}-{copy}"
            path = os.path.join(root, name)
            if not _in_use(path) and not (resolved["resume"] == "never" and os.path.exists(path)):
                return cls(name, path, False)
        raise RuntimeError(f"there are {_MAX_COPIES} runs named {base} in {root}")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder and hold its lock, which the kernel releases if this process dies."""
        os.makedirs(os.path.join(self.path, "logs"), exist_ok=True)
        if self.shared:
            yield
            return
        with open(_lock_path(self.path), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def result(self) -> Any:
        """What the app returned on rank 0, or None."""
        try:
            with open(os.path.join(self.path, "result.json"), encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return None


def default_name(app: Mapping[str, Any]) -> str:
    """``<app name>-<hash of its settings>``."""
    digest = hashlib.blake2b(json.dumps(app, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
    return f"{app.get('name') or str(app['_target_']).rpartition('.')[2]}-{digest}"


def _lock_path(path: str) -> str:
    return os.path.join(path, ".lock")


def _in_use(path: str) -> bool:
    try:
        with open(_lock_path(path)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
