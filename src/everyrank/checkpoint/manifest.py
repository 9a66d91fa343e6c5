"""The manifest of a checkpoint: what it is, and the size and checksum of each of its files.

A checkpoint is whole if its manifest is, and if every file has the size and SHA-256 that the manifest says (what
``sha256sum`` prints). The manifest carries a checksum of its own text.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import everyrank
from everyrank.checkpoint.encoding import decode_json, encode_json
from everyrank.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
# Bytes written or read at a time: large enough to be one long call without the interpreter's lock, small enough that
# the bytes are still in the processor's cache when their checksum is taken.
_CHUNK = 4 << 20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: Optimizer step at which it was taken.
        metric: Value it is ranked by, or None.
        world_size: Number of ranks that took it.
        versions: Versions of everyrank, Python and torch.
        files: Record of each file by name, all in the checkpoint's own folder.
    """

    step: int
    metric: float | None
    world_size: int
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str] = field(default_factory=lambda: current_versions())

    @property
    def num_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(record.size for record in self.files.values())

    def to_text(self) -> str:
        """Return the text of ``manifest.json``."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "metric": encode_json(self.metric),
            "world_size": self.world_size,
            "versions": dict(sorted(self.versions.items())),
            "files": {
                name: {"size": record.size, "sha256": record.sha256} for name, record in sorted(self.files.items())
            },
        }
        return _render({**body, "sha256": _checksum(body)})


def current_versions() -> dict[str, str]:
    """Return the versions that a checkpoint is written with."""
    return {"everyrank": everyrank.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest of a checkpoint's folder.

    Raises:
        CheckpointError: If it is missing or damaged; the message is the reason alone.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error})") from error
    try:
        body = json.loads(text)
        checksum = body.pop("sha256")
        whole = checksum == _checksum(body) and text == _render({**body, "sha256": checksum})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{MANIFEST} is damaged")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{MANIFEST} has format {body['format']}, but this version of everyrank reads format {FORMAT}"
        )
    files = {name: FileRecord(**record) for name, record in body["files"].items()}
    if any(name != Path(name).name for name in files):
        raise CheckpointError(f"{MANIFEST} names files outside its folder")
    return Manifest(
        step=body["step"],
        metric=decode_json(body["metric"]),
        world_size=body["world_size"],
        files=files,
        versions=body["versions"],
    )


def find_damage(checkpoint: Path) -> str | None:
    """Compare every file of a checkpoint with its manifest.

    Returns:
        None if the checkpoint is whole, otherwise what is wrong with it.
    """
    try:
        manifest = read_manifest(checkpoint)
        for name, record in manifest.files.items():  # sizes first: they cost nothing
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != record.size:
                return f"{name} has {path.stat().st_size} bytes instead of {record.size}"
        for name, record in manifest.files.items():
            if checksum_of_file(checkpoint / name) != record.sha256:
                return f"{name} does not have the checksum it was written with"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def write_file(path: Path, parts: Iterable[memoryview]) -> FileRecord:
    """Write a new file, flush it to the disk, and return its record.

    Neither writing nor the checksum holds the interpreter's lock.

    Args:
        path: Where to write; must not exist.
        parts: The file's bytes, as one-dimensional views of bytes.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            for begin in range(0, len(part), _CHUNK):
                chunk = part[begin : begin + _CHUNK]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size=size, sha256=digest.hexdigest())


def checksum_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=1, allow_nan=False) + "\n"


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_render(body).encode()).hexdigest()
