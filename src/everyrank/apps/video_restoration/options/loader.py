"""Reading an option file: parse, refuse what is unknown, fill in what is missing, resolve what follows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everyrank.apps.video_restoration.options.key import REQUIRED, Key
from everyrank.apps.video_restoration.options.keys import (
    DATA,
    DATA_SECTIONS,
    DATASET_TYPES,
    DATASETS,
    DERIVED,
    IGNORED,
    SECTIONS,
    TOP,
)
from everyrank.apps.video_restoration.options.text import parse
from everyrank.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)


def load_options(path: str | Path) -> dict[str, Any]:
    """Return the resolved options of a JSON option file.

    Every known key is present: those missing in the file have their documented default. Besides, ``path`` has
    ``task``, ``models``, ``images`` and ``log``, the folders of the run, and each data section has the ``scale`` and
    ``n_channels`` of the run and its ``phase``.

    Args:
        path: The option file.

    Raises:
        ConfigError: The file is missing or no JSON (with line and column), or keys are unknown, missing or hold what
            they cannot; all problems are listed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near) if near else f" The folder {path.parent} has no option files."
        raise ConfigError(f"--opt: the option file {path} cannot be read ({error.strerror}).{hint}") from error
    given, notices = parse(text, str(path))
    for notice in notices:
        logger.warning(notice)
    return resolve(given, str(path))


def resolve(given: Mapping[str, Any], source: str = "options") -> dict[str, Any]:
    """Check ``given`` options and complete them; see :func:`load_options`."""
    problems: list[str] = []
    sections = set(SECTIONS) | {"datasets"}
    top = _section({k: v for k, v in given.items() if k not in sections}, TOP, "", problems, also=sections)
    for name, keys in SECTIONS.items():
        top[name] = _section(_mapping(given, name, problems), keys, f"{name}.", problems)
    data = _section(_mapping(given, "datasets", problems), DATASETS, "datasets.", problems)
    top["datasets"] = {}
    for name, keys in DATA_SECTIONS.items():
        if data.get(name) is not None:
            section = _section(_mapping(data, name, problems), keys, f"datasets.{name}.", problems)
            section |= {"scale": top["scale"], "n_channels": top["n_channels"], "phase": name}
            top["datasets"][name] = section
    if not top["datasets"]:
        problems.append("datasets: found neither train nor test; give at least one")
    problems += _contradictions(top)
    if problems:
        raise ConfigError(f"{source}: these options cannot be used:", problems)
    _derive(top)
    _notice_overruled(given, top)
    return top


def _mapping(options: Mapping[str, Any], name: str, problems: list[str]) -> Mapping[str, Any]:
    value = options.get(name) or {}
    if isinstance(value, dict):
        return value
    problems.append(f"{name}: found {value!r}; give a section {{ ... }}")
    return {}


def _section(
    given: Mapping[str, Any], keys: Mapping[str, Key], prefix: str, problems: list[str], also: set[str] | None = None
) -> dict[str, Any]:
    for name in given:
        if name not in keys:
            problems.append(f"{prefix}{name}: there is no such key.{did_you_mean(name, [*keys, *(also or ())])}")
        elif keys[name].meaning == IGNORED and given[name] not in (None, False, keys[name].default):
            logger.info("%s%s is ignored: nothing here depends on it", prefix, name)
    resolved = {}
    for name, key in keys.items():
        if key.meaning == DERIVED:
            continue
        if name not in given and key.default is REQUIRED:
            problems.append(f"{prefix}{name} is missing: {key.meaning}")
            continue
        value = given.get(name, key.default)
        problem = key.problem(value) if name in given else None
        if problem:
            problems.append(f"{prefix}{name}: {problem}")
        resolved[name] = list(value) if isinstance(value, list) else value
    return resolved


def _contradictions(options: Mapping[str, Any]) -> list[str]:
    """Problems between keys that are each fine."""
    problems = []
    gpu_ids = options.get("gpu_ids")
    if isinstance(gpu_ids, str) and gpu_ids != "auto":
        problems.append(f'gpu_ids: found {gpu_ids!r}; give a list of numbers or "auto"')
    upscale = options["netG"].get("upscale")
    if upscale not in (None, options.get("scale")):
        problems.append(f"netG.upscale is {upscale} and scale is {options.get('scale')}: make them equal")
    for name, data in options["datasets"].items():
        kind = data.get("dataset_type")
        if kind is not None and kind not in DATASET_TYPES:
            problems.append(
                f"datasets.{name}.dataset_type: found {kind!r}; give one of {list(DATASET_TYPES)}."
                f"{did_you_mean(kind, DATASET_TYPES)}"
            )
        root = "dataroot_lq" if kind == "SingleVideoRecurrentTestDataset" else "dataroot_gt"
        if not data.get(root):
            problems.append(f"datasets.{name}.{root} is missing: {DATA[root].meaning}")
        backend = data.get("io_backend")
        kind = backend.get("type") if isinstance(backend, dict) else backend
        if kind not in (None, "disk", "lmdb", "video"):
            problems.append(
                f'datasets.{name}.io_backend: found {backend!r}; give {{"type": "disk"}}, "lmdb" or "video"'
            )
        every = 2 if options["netG"].get("pa_frames") == 0 else 1
        if data.get("temporal_scale") not in (None, every):
            problems.append(
                f"datasets.{name}.temporal_scale: found {data['temporal_scale']}; netG.pa_frames is "
                f"{options['netG'].get('pa_frames')}, with which it is {every}"
            )
        span = data.get("frame_range")
        if span is not None and (len(span) != 2 or not 0 <= span[0] < span[1]):
            problems.append(f"datasets.{name}.frame_range: found {span}; give [first, stop] with 0 <= first < stop")
    train = options["datasets"].get("train")
    if train is not None:
        vimeo = "Vimeo" in str(train.get("dataset_type"))  # its sequences have seven frames
        for name in ("dataloader_batch_size", "gt_size", *(() if vimeo else ("num_frame",))):
            if isinstance(train.get(name), int) and train[name] < 1:
                problems.append(f"datasets.train.{name}: found {train[name]}; give at least 1")
        if isinstance(train.get("gt_size"), int) and train["gt_size"] % (options.get("scale") or 1):
            problems.append(f"datasets.train.gt_size is {train['gt_size']}, which scale {options['scale']} must divide")
    return problems


def _derive(options: dict[str, Any]) -> None:
    if options["netG"]["upscale"] is None:
        options["netG"]["upscale"] = options["scale"]
    task = Path(options["path"]["root"]) / options["task"]
    options["path"] |= {
        "task": str(task),
        "models": str(task / "models"),
        "images": str(task / "images"),
        "log": str(task / "logs"),
    }
    train = options["train"]
    if train["G_scheduler_periods"] is None:
        train["G_scheduler_periods"] = [train["total_iter"]]
    for name in ("G_scheduler_periods", "G_scheduler_restart_weights"):
        if not isinstance(train[name], list):
            train[name] = [train[name]]
    if train["manual_seed"] is None:
        train["manual_seed"] = 0
    test = options["datasets"].get("test", {})
    options["val"]["pad_seq"] |= test.get("pad_sequence", False)
    options["val"]["flip_seq"] |= test.get("mirror_sequence", False)


def _notice_overruled(given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Say which keys of a resolved file hold something else than what follows from the keys they were made of."""
    pairs = [(f"{name}.", given.get(name) or {}, options[name], keys) for name, keys in SECTIONS.items()]
    for name, section in options["datasets"].items():
        pairs.append((f"datasets.{name}.", given["datasets"][name], section, DATA_SECTIONS[name]))
    for prefix, found, resolved, keys in pairs:
        for name, key in keys.items():
            if key.meaning == DERIVED and name in found and found[name] != resolved.get(name, options.get(name)):
                value = resolved.get(name, options.get(name))
                logger.info("%s%s %r is ignored: by the other keys it is %r", prefix, name, found[name], value)
