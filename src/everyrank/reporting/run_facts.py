"""What a run's folder holds, read as far as it can be read: a run that was killed leaves a partial one."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everyrank.diagnosis.rank_files import attempt_dir, newest_attempt, pace_file, read_json, watch_dir
from everyrank.diagnosis.verdict import Verdict, read_verdicts
from everyrank.errors import DataError

if TYPE_CHECKING:
    from everyrank.checkpoint.folder import CheckpointInfo

Row = dict[str, Any]

_SIGNS_OF_A_RUN = (
    "config.yaml",
    "run.yaml",
    "history.jsonl",
    "result.json",
    "checkpoints/step-*",
    "logs/rank-*.log",
    "verdict.json",
)
_LOG_NAME = re.compile(r"rank-(\d+)\.log")
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_MAX_IMAGE_BYTES = 8 << 20
_MAX_IMAGES = 12
_CONFIGS = ("run.yaml", "config.yaml", "options.json")
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """What the committed steps used.

    Attributes:
        num_steps: Number of committed optimizer steps.
        world_sizes: World sizes of the committed steps, in order, each change once.
        epochs: For each epoch: samples used, different ones among them, and the most often any was used.
    """

    num_steps: int
    world_sizes: tuple[int, ...]
    epochs: Mapping[int, tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run's folder as data; whatever is missing is empty or None.

    Attributes:
        folder: The run's folder.
        configs: Text of each configuration file, by name.
        rows: The rows of ``history.jsonl``.
        result: What the app returned, or None.
        checkpoints: Its checkpoints, verified.
        logs: Last lines of each rank's log, by rank.
        images: Pictures that the run drew: name, media type, bytes.
        ledger: Summary of the ledger, or None.
        versions: Versions that the newest readable checkpoint was written with.
        verdicts: Who was guilty of the end of each attempt that failed, in order.
        pace: How the ranks shared the time of their latest collectives, or None.
        problems: What could not be read, and why.
    """

    folder: Path
    configs: Mapping[str, str]
    rows: tuple[Row, ...]
    result: Any
    checkpoints: tuple[CheckpointInfo, ...]
    logs: Mapping[int, tuple[str, ...]]
    images: tuple[tuple[str, str, bytes], ...]
    ledger: LedgerSummary | None
    versions: Mapping[str, str]
    verdicts: tuple[Verdict, ...]
    pace: Mapping[str, Any] | None
    problems: tuple[str, ...] = field(default=())


def read_run(folder: Path, num_log_lines: int = 40) -> RunFacts:
    """Read a run's folder.

    Args:
        folder: The folder.
        num_log_lines: Number of last lines to keep of each rank's log.

    Raises:
        DataError: It is no run's folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} was given, but there is no such folder. Give the folder that the run printed.")
    if not any(any(folder.glob(sign)) for sign in _SIGNS_OF_A_RUN):
        inside = sorted(path.parent.name for path in folder.glob("*/run.yaml"))
        hint = f" Did you mean one of the runs in it, such as {folder / inside[0]}?" if inside else ""
        raise DataError(
            f"{folder} was given, but it is no run's folder: it has none of {', '.join(_SIGNS_OF_A_RUN)}.{hint}"
        )
    problems: list[str] = []
    watch = watch_dir(str(folder))
    history = folder / "history.jsonl"
    rows = _json_lines(history, problems) if history.is_file() else []
    checkpoints, versions = _read_checkpoints(folder / "checkpoints")
    return RunFacts(
        folder=folder,
        configs={name: _text(folder / name) for name in _CONFIGS if (folder / name).is_file()},
        rows=tuple(rows),
        result=_read_result(folder / "result.json", problems),
        checkpoints=checkpoints,
        logs=_read_logs(folder / "logs", num_log_lines),
        images=_read_images(folder, problems),
        ledger=_read_ledger(folder / "ledger", problems),
        versions=versions,
        verdicts=read_verdicts(str(folder)),
        pace=read_json(pace_file(attempt_dir(watch, newest_attempt(watch)))),
        problems=tuple(problems),
    )


def is_number(value: Any) -> bool:
    """Whether ``value`` can be drawn: a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _json_lines(path: Path, problems: list[str]) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            problems.append(f"{path.name}, line {number}: cut off or damaged; the lines after it were left out")
            break
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_result(path: Path, problems: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(_text(path))
    except ValueError as error:
        problems.append(f"result.json: {error}")
        return None


def _read_checkpoints(folder: Path) -> tuple[tuple[CheckpointInfo, ...], Mapping[str, str]]:
    if not folder.is_dir():
        return (), {}
    from everyrank.checkpoint.folder import list_checkpoints
    from everyrank.checkpoint.manifest import read_manifest
    from everyrank.errors import CheckpointError

    infos = tuple(list_checkpoints(folder))
    for info in reversed(infos):
        try:
            return infos, read_manifest(info.path).versions
        except CheckpointError:
            continue
    return infos, {}


def _read_logs(folder: Path, num_lines: int) -> dict[int, tuple[str, ...]]:
    logs = {}
    for path in folder.glob("rank-*.log"):
        if match := _LOG_NAME.fullmatch(path.name):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                lines = file.read().decode("utf-8", errors="replace").splitlines()
            logs[int(match.group(1))] = tuple(lines[-num_lines:]) if num_lines else ()
    return dict(sorted(logs.items()))


def _read_images(folder: Path, problems: list[str]) -> tuple[tuple[str, str, bytes], ...]:
    images: list[tuple[str, str, bytes]] = []
    for path in [*sorted(folder.iterdir()), *sorted((folder / "images").glob("*"))]:
        kind = _IMAGE_TYPES.get(path.suffix.lower())
        # The page draws the curves itself.
        if kind is None or path.name == "curves.png" or not path.is_file():
            continue
        if path.stat().st_size > _MAX_IMAGE_BYTES:
            problems.append(f"{path.name}: left out, larger than {_MAX_IMAGE_BYTES >> 20} MiB")
            continue
        if len(images) == _MAX_IMAGES:
            problems.append(f"only the first {_MAX_IMAGES} pictures are shown")
            break
        images.append((str(path.relative_to(folder)), kind, path.read_bytes()))
    return tuple(images)


def _read_ledger(folder: Path, problems: list[str]) -> LedgerSummary | None:
    files = sorted(folder.glob("step-*.jsonl"))
    if not files:
        return None
    used: dict[int, Counter[int]] = {}
    steps: dict[int, int] = {}
    for file in files:
        for entry in _json_lines(file, problems):
            try:
                used.setdefault(int(entry["epoch"]), Counter()).update(entry["samples"])
                steps[int(entry["step"])] = int(entry["world_size"])
            except (KeyError, TypeError, ValueError):
                problems.append(f"ledger/{file.name}: an entry has not the ledger's form")
    sizes = (size for size, _ in groupby(steps[step] for step in sorted(steps)))
    epochs = {e: (c.total(), len(c), max(c.values(), default=0)) for e, c in sorted(used.items())}
    return LedgerSummary(num_steps=len(steps), world_sizes=tuple(sizes), epochs=epochs)
