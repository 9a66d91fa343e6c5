"""The cache of samples on disk: made once, by all ranks together, and safe when several runs start at once.

::

    <folder>/<key>/shard-00000.safetensors   samples 0..255; complete and checksummed, or not there at all
    <folder>/<key>/recipe.json               what the key stands for, for people
    <folder>/<key>/lock                      byte s of it is locked while somebody makes shard s

A shard is a pure function of its recipe and number, so whoever makes it makes the same bytes: a lock only saves work,
and nothing breaks on a file system without locks. Files are written beside and renamed. Nothing is unpickled.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import os
import socket
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from everyrank import DataError, World, agree, get_logger
from everyrank.apps.causal_sets.samples import GENERATOR_VERSION, Recipe, draw_sample

SHARD_SIZE = 256
"""Samples in a shard: about 0.1 s of work, so that the ranks finish together."""

Arrays = dict[str, NDArray]

_log = get_logger(__name__)


def cache_key(recipe: Recipe) -> str:
    """Return the name of the recipe's folder, free of the number of samples: a larger set reuses a smaller one."""
    text = json.dumps({"version": GENERATOR_VERSION, "shard_size": SHARD_SIZE, **_ingredients(recipe)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ingredients(recipe: Recipe) -> dict[str, Any]:
    """What determines the samples, also where more is set beside it."""
    return {field.name: getattr(recipe, field.name) for field in fields(Recipe)}


def load_or_make(folder: Path, recipe: Recipe, num_samples: int, world: World) -> list[Arrays]:
    """Return the shards that hold samples 0..num_samples-1, making those that are missing. Collective.

    Every rank makes its part; ranks that don't see another rank's files (a cache folder on each node's own disk) then
    make the rest with their neighbours on the node.

    Args:
        folder: The cache folder; made if it does not exist.
        recipe: What determines the samples.
        num_samples: How many samples are needed.
        world: The ranks that call this together.

    Returns:
        Shards in order, each with ``counts`` [nodes, 6], ``links`` [2, links], and ``num_nodes``, ``num_links``,
        ``kind``, ``dimension`` and ``num_relations`` for each of its samples.

    Raises:
        DataError: On every rank, naming the ranks whose folder cannot be written.
    """
    home = Path(folder) / cache_key(recipe)
    paths = [home / f"shard-{shard:05d}.safetensors" for shard in range(-(-num_samples // SHARD_SIZE))]
    for rank, size in ((world.rank, world.world_size), (world.local_rank, world.local_world_size)):
        agree(functools.partial(_make_missing, home, recipe, paths, range(rank, len(paths), size)))
    return [_read(path) or make_shard(recipe, shard) for shard, path in enumerate(paths)]


def make_shard(recipe: Recipe, shard: int) -> Arrays:
    """Draw the samples of one shard and lay them end to end."""
    samples = [draw_sample(recipe, index) for index in range(shard * SHARD_SIZE, (shard + 1) * SHARD_SIZE)]
    return {
        "counts": np.concatenate([sample.counts for sample in samples]),
        "links": np.concatenate([sample.links for sample in samples], axis=1),
        "num_nodes": np.array([len(sample.counts) for sample in samples], dtype=np.int32),
        "num_links": np.array([sample.links.shape[1] for sample in samples], dtype=np.int32),
        "kind": np.array([sample.kind for sample in samples], dtype=np.int16),
        "dimension": np.array([sample.dimension for sample in samples], dtype=np.int16),
        "num_relations": np.array([sample.num_relations for sample in samples], dtype=np.int32),
    }


def _make_missing(home: Path, recipe: Recipe, paths: Sequence[Path], mine: Sequence[int]) -> None:
    """Make this rank's missing shards."""
    missing = [shard for shard in mine if _read(paths[shard], level=logging.WARNING) is None]
    if not missing:
        return
    try:
        home.mkdir(parents=True, exist_ok=True)
        _replace(home / "recipe.json", (json.dumps(_ingredients(recipe), indent=1) + "\n").encode())
        with open(home / "lock", "a+b") as locks:
            # First what nobody else is making; then wait for the others, and find their work done.
            for wait in (False, True):
                missing = [shard for shard in missing if not _make_one(recipe, paths[shard], shard, locks, wait)]
    except OSError as error:
        raise DataError(
            f"The cache of causal sets was to be written to {home}, but this failed: {type(error).__name__}: {error}. "
            "Fix: set env.data_dir to a folder that every rank can write to, with space left."
        ) from error


def _make_one(recipe: Recipe, path: Path, shard: int, locks: BinaryIO, wait: bool) -> bool:
    """Make a shard unless another process has it in hand; return whether it is there now."""
    with _lock(locks, shard, wait=wait) as held:
        if not held:
            return False
        if _read(path) is None:
            arrays = make_shard(recipe, shard)
            _replace(path, save(arrays, metadata={"crc32": str(_checksum(arrays))}))
        return True


def _read(path: Path, level: int = logging.DEBUG) -> Arrays | None:
    """Return a shard that is whole, or None for one that is missing or (said at ``level``) damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            expected = (file.metadata() or {}).get("crc32")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        _log.log(level, "Cache file %s is damaged (%s); making it again.", path, error)
        return None
    if expected != str(_checksum(arrays)):
        _log.log(level, "Cache file %s is damaged (its checksum differs); making it again.", path)
        return None
    return arrays


def _checksum(arrays: Arrays) -> int:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).data, checksum)
    return checksum


def _replace(path: Path, content: bytes) -> None:
    """Write beside and rename: a reader sees the old file or the new one, whole."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _lock(locks: BinaryIO, shard: int, *, wait: bool) -> Iterator[bool]:
    """Yield whether the shard is ours to make; without ``wait``, False if somebody else has it in hand.

    Locks are advisory, one byte of a file for each shard, and released by the system when their process ends.
    """
    try:
        fcntl.lockf(locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, shard)
    except BlockingIOError:
        yield False
        return
    except OSError:  # a file system without locks
        yield True
        return
    try:
        yield True
    finally:
        fcntl.lockf(locks, fcntl.LOCK_UN, 1, shard)
