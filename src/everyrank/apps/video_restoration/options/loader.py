"""Reading an option file: parse, refuse what is unknown, fill in what is missing, resolve what follows."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from everyrank import ConfigError, did_you_mean, schema
from everyrank.apps.video_restoration.options.keys import DATASET_TYPES, DERIVED, IGNORED, Options
from everyrank.apps.video_restoration.options.text import parse

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
    sections = {field.name for field in dataclasses.fields(Options)} - {"gpu_ids", "dist"}
    present = {name: value for name, value in given.items() if value is not None or name not in sections}
    checked = schema.build(Options, present, what=f"option file {source}", checks=_contradictions)
    options = schema.as_mapping(checked)
    options["datasets"] = {name: section for name, section in options["datasets"].items() if section is not None}
    _derive(options)
    for path, meaning, value in _oddities(Options, given):
        if meaning == IGNORED:
            logger.info("%s is ignored: nothing here depends on it", path)
        elif (true := _at(options, path)) != value:
            logger.info("%s %r is ignored: by the other keys it is %r", path, value, true)
    return options


def _oddities(section: Any, given: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield path, meaning and value of the given keys that have no effect, where they hold anything to speak of."""
    for field in dataclasses.fields(section) if isinstance(given, Mapping) else ():
        if field.name not in given:
            continue
        info, value = section.__pydantic_fields__[field.name], given[field.name]
        if info.description in (IGNORED, DERIVED):
            if info.description == DERIVED or value not in (None, False, info.default):
                yield prefix + field.name, info.description, value
        elif (inner := schema.section_at(section, field.name)) is not None:
            yield from _oddities(inner, value, f"{prefix}{field.name}.")


def _at(options: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path; ``scale`` of the network is the run's."""
    *sections, name = path.split(".")
    section: Any = options
    for part in sections:
        section = section[part]
    return section.get(name, options.get(name))


def _contradictions(options: Options) -> list[str]:
    """Problems between keys that are each fine."""
    problems = []
    if isinstance(options.gpu_ids, str) and options.gpu_ids != "auto":
        problems.append(f'gpu_ids: found {options.gpu_ids!r}; give a list of numbers or "auto"')
    if options.netG.upscale not in (None, options.scale):
        problems.append(f"netG.upscale is {options.netG.upscale} and scale is {options.scale}: make them equal")
    datasets = {"train": options.datasets.train, "test": options.datasets.test}
    if not any(datasets.values()):
        problems.append("datasets: found neither train nor test; give at least one")
    for name, data in datasets.items():
        if data is not None:
            problems += [f"datasets.{name}.{problem}" for problem in _wrong_data(data, options.netG.pa_frames)]
    train = options.datasets.train
    if train is not None:
        vimeo = "Vimeo" in train.dataset_type  # its sequences have seven frames
        for key in ("dataloader_batch_size", "gt_size", *(() if vimeo else ("num_frame",))):
            if getattr(train, key) < 1:
                problems.append(f"datasets.train.{key}: found {getattr(train, key)}; give at least 1")
        if train.gt_size % options.scale:
            problems.append(f"datasets.train.gt_size is {train.gt_size}, which scale {options.scale} must divide")
    return problems


def _wrong_data(data: Any, pa_frames: int) -> Iterator[str]:
    kind = data.dataset_type
    if kind not in DATASET_TYPES:
        yield (f"dataset_type: found {kind!r}; give one of {list(DATASET_TYPES)}.{did_you_mean(kind, DATASET_TYPES)}")
    root = "dataroot_lq" if kind == "SingleVideoRecurrentTestDataset" else "dataroot_gt"
    if not getattr(data, root):
        yield f"{root} is missing: {type(data).__pydantic_fields__[root].description}"
    backend = data.io_backend.get("type") if isinstance(data.io_backend, dict) else data.io_backend
    if backend not in (None, "disk", "lmdb", "video"):
        yield f'io_backend: found {data.io_backend!r}; give {{"type": "disk"}}, "lmdb" or "video"'
    every = 2 if pa_frames == 0 else 1
    if data.temporal_scale not in (None, every):
        yield f"temporal_scale: found {data.temporal_scale}; netG.pa_frames is {pa_frames}, with which it is {every}"
    span = data.frame_range
    if span is not None and (len(span) != 2 or not 0 <= span[0] < span[1]):
        yield f"frame_range: found {span}; give [first, stop] with 0 <= first < stop"


def _derive(options: dict[str, Any]) -> None:
    for name, section in options["datasets"].items():
        section |= {"scale": options["scale"], "n_channels": options["n_channels"], "phase": name}
    network = options["netG"]
    del network["scale"]
    network["upscale"] = options["scale"]
    task = Path(options["path"]["root"]) / options["task"]
    options["path"] |= {"task": str(task), **{name: str(task / name) for name in ("models", "images")}}
    options["path"]["log"] = str(task / "logs")
    train = options["train"]
    if train["G_scheduler_periods"] is None:
        train["G_scheduler_periods"] = [train["total_iter"]]
    for name in ("G_scheduler_periods", "G_scheduler_restart_weights"):
        if not isinstance(train[name], list):
            train[name] = [train[name]]
    train["manual_seed"] = train["manual_seed"] or 0
    test = options["datasets"].get("test", {})
    options["val"]["pad_seq"] |= test.get("pad_sequence", False)
    options["val"]["flip_seq"] |= test.get("mirror_sequence", False)
