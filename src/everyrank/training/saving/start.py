"""Where a run starts: anew, from its newest checkpoint, or from one that was named; and what then must go aside."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everyrank.checkpoint.folder import checkpoint_paths, list_checkpoints, new_token
from everyrank.diagnosis.rank_files import read_json
from everyrank.errors import ConfigError, did_you_mean
from everyrank.runtime.logs import get_logger
from everyrank.training.saving.reload import find_in

logger = get_logger("training")

TRIAL_MARK = "trial.json"
_MARK = "resumed-from.json"
_LEFT_BY_A_RUN = ("checkpoints", "ledger", "history.jsonl", "tensorboard", "curves.png", _MARK, TRIAL_MARK)


@dataclass(frozen=True)
class Start:
    """What ``training.resume`` comes to.

    Attributes:
        kind: ``auto``, ``never`` or ``path``.
        source: The checkpoint that was named, with ``path``.
    """

    kind: Literal["auto", "never", "path"]
    source: Path | None = None


def find_start(run: Path, resume: str) -> Start:
    """Return where a run starts; nothing is changed.

    A run that has started from the path before, and has checkpoints of its own since, goes on from those: the same
    command again never loses what it has done.

    Raises:
        ConfigError: ``resume`` is no path, and nearly one of the two words.
        CheckpointError: There is no whole checkpoint at the path.
    """
    if resume in ("auto", "never"):
        return Start(resume)  # type: ignore[arg-type]
    path = Path(os.path.expanduser(resume))
    mark = read_json(str(run / _MARK)) or {}
    if mark.get("path") == os.path.realpath(path) and checkpoint_paths(run / "checkpoints"):
        return Start("auto")
    if not path.exists():
        hint = did_you_mean(resume, ("auto", "never"))
        raise ConfigError(
            f"training.resume is {resume!r}, which is neither auto nor never, and there is no such path.{hint} Fix: "
            "name a checkpoint's folder, or a run's."
        )
    return Start("path", find_in(path))


def make_way(run: Path, start: Start, resume: str) -> None:
    """Move aside what earlier runs left in the way of this start; rank 0 calls it."""
    if start.kind == "auto":
        return
    if start.source is not None and start.source.parent.resolve() == (run / "checkpoints").resolve():
        _go_back(run, start.source)
    else:
        moved = set_aside(run, _LEFT_BY_A_RUN)
        if moved is not None:
            logger.info("training.resume is %s: what an earlier run left here is now in %s", resume, moved)
    if start.source is not None:
        text = json.dumps({"path": os.path.realpath(os.path.expanduser(resume))})
        (run / _MARK).write_text(text + "\n", encoding="utf-8")


def set_aside(run: Path, names: tuple[str, ...]) -> Path | None:
    """Move what an earlier run left under these names into ``<run>/previous-<n>``, and return that folder or None."""
    found = [run / name for name in names if (run / name).exists()]
    if not any(path.is_file() or any(path.iterdir()) for path in found):
        return None
    number = 1
    while (run / f"previous-{number}").exists():
        number += 1
    target = run / f"previous-{number}"
    target.mkdir()
    for path in found:
        os.replace(path, target / path.name)
    return target


def _go_back(run: Path, source: Path) -> None:
    """Later checkpoints belong to a future this run does not take; ``auto`` must not find them next time."""
    found = list_checkpoints(source.parent, verify=False)
    step = next(info.step for info in found if info.path.name == source.name)
    for info in found:
        if info.step > step:
            target = run / f"unused-{info.path.name}"
            target = target if not target.exists() else target.with_name(f"{target.name}-{new_token()}")
            os.replace(info.path, target)
            logger.info("going back to step %d: %s is now %s", step, info.path.name, target)
