"""The folder of a run's checkpoints: names, the one step that makes a checkpoint appear, and leftovers of killed runs.

::

    checkpoints/
      step-00001200/              a checkpoint
      step-00001400.replaced/     only for an instant, while another checkpoint of the same step takes its place
      damaged-step-00001300/      was found damaged when a run went on from an earlier one
      .writing-00001400-x1y2z3/   being written; a leftover if its writer is dead
      .deleting-00000800-x1y2z3/  being deleted

A checkpoint is complete before it gets its name, and loses its name before it is deleted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from everyrank.checkpoint.manifest import MANIFEST, find_damage, read_manifest
from everyrank.errors import CheckpointError, UnwritableError

logger = logging.getLogger(__name__)

_REPLACED = ".replaced"
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_WRITING = ".writing-"
_DELETING = ".deleting-"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What can be told of a checkpoint without loading it.

    Attributes:
        path: Its folder.
        step: Optimizer step at which it was taken.
        metric: Value it is ranked by, or None.
        num_bytes: Size of its files.
        world_size: Number of ranks that took it; 0 if its manifest cannot be read.
        verified: True if every checksum was compared and agrees, False if it is damaged, None if it was not compared.
        reason: What is wrong with it; empty if nothing is known to be.
    """

    path: Path
    step: int
    metric: float | None
    num_bytes: int
    world_size: int
    verified: bool | None
    reason: str = ""


def list_checkpoints(folder: Path | str, verify: bool = True) -> list[CheckpointInfo]:
    """List the checkpoints of a folder, oldest step first.

    Args:
        folder: The folder that holds ``step-...`` folders. One that does not exist holds no checkpoints.
        verify: Compare the checksums of all files, which reads them whole. Otherwise only manifests are read.
    """
    return [describe(path, verify=verify) for path in checkpoint_paths(Path(folder))]


def describe(path: Path, *, verify: bool) -> CheckpointInfo:
    """Describe one checkpoint; see ``list_checkpoints``."""
    reason = find_damage(path) if verify else None
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return CheckpointInfo(
            path=path,
            step=_step_of(path.name),
            metric=None,
            num_bytes=sum(file.stat().st_size for file in path.glob("*") if file.is_file()),
            world_size=0,
            verified=False,
            reason=str(error),
        )
    return CheckpointInfo(
        path=path,
        step=manifest.step,
        metric=manifest.metric,
        num_bytes=manifest.num_bytes,
        world_size=manifest.world_size,
        verified=reason is None if verify else None,
        reason=reason or "",
    )


def first_whole(candidates: Iterable[Path]) -> tuple[CheckpointInfo | None, list[CheckpointInfo]]:
    """Return the first whole checkpoint of these, or None; and the damaged ones before it, which the log names."""
    damaged: list[CheckpointInfo] = []
    for path in candidates:
        info = describe(path, verify=True)
        if info.verified:
            return info, damaged
        logger.warning("skipping the damaged checkpoint %s: %s", path.name, info.reason)
        damaged.append(info)
    return None, damaged


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, whole or not, oldest step first."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except FileNotFoundError:
        return []
    found = [name for name in names if _NAME.fullmatch(name)]
    # Of two with the same step, the one that was about to be replaced comes first: the other is newer.
    return [folder / name for name in sorted(found, key=lambda name: (_step_of(name), not name.endswith(_REPLACED)))]


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def new_token() -> str:
    """Return a few random characters, for a name that nobody else uses."""
    return secrets.token_hex(4)


def writing_path(folder: Path, step: int, token: str) -> Path:
    """Return the hidden folder in which a checkpoint is being written."""
    return folder / f"{_WRITING}{step:08d}-{token}"


@contextmanager
def writing(folder: Path, step: int, token: str) -> Iterator[Path]:
    """Give a hidden folder to write a checkpoint into; when the block ends without an error, it appears in one step.

    Args:
        folder: The folder of all checkpoints.
        step: Optimizer step.
        token: Makes the hidden folder's name unique; see ``new_token``.

    Raises:
        OSError: If the disk is full, the folder has vanished, and the like. Nothing is left behind then.
    """
    temporary = writing_path(folder, step, token)
    temporary.mkdir()  # as the user's umask has it, unlike tempfile.mkdtemp
    descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor)  # tells others that this folder's writer is alive
        yield temporary
        os.fsync(descriptor)
        _publish(temporary, folder / checkpoint_name(step))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _publish(temporary: Path, final: Path) -> None:
    """Rename ``temporary`` to ``final``. If this step has a whole checkpoint already, there is one at every instant."""
    replaced = final.with_name(final.name + _REPLACED)
    replaces = final.exists()
    if replaces:
        if replaced.exists():
            delete(replaced)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_directory(final.parent)
    if replaces:
        delete(replaced)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint: it loses its name first, so that none is ever seen half-deleted."""
    hidden = checkpoint.parent / f"{_DELETING}{_step_of(checkpoint.name):08d}-{new_token()}"
    hidden.mkdir()
    os.rename(checkpoint, hidden)  # onto an empty folder, which a rename replaces
    shutil.rmtree(hidden, ignore_errors=True)  # what is left of it goes with the next run's leftovers


def identify(path: Path, *, verify: bool) -> str:
    """Return what tells this copy of a checkpoint from another; empty if there is none, or it is damaged.

    Args:
        path: The checkpoint's folder.
        verify: Compare the checksums of all files.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if verify and find_damage(path) is not None else text


def set_aside(checkpoint: Path) -> None:
    """Give a damaged checkpoint a name under which it is none, for a person to look at."""
    target = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if target.exists():
        target = target.with_name(f"{target.name}-{new_token()}")
    try:
        os.rename(checkpoint, target)
    except OSError as error:
        logger.warning("the damaged checkpoint %s could not be set aside: %s", checkpoint, error)
    else:
        logger.warning("the damaged checkpoint %s is now %s", checkpoint.name, target.name)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left behind. Folders that a living writer holds are left alone."""
    for path in checkpoint_paths(folder):
        final = path.with_name(path.name.removesuffix(_REPLACED))
        if path.name.endswith(_REPLACED):
            if final.exists():
                delete(path)
            else:
                os.rename(path, final)  # killed between the two renames of _publish
    for path in folder.iterdir():
        if path.name.startswith((_WRITING, _DELETING)) and not _has_living_writer(path):
            logger.info("removing %s, left behind by a killed run", path.name)
            shutil.rmtree(path, ignore_errors=True)


def sync_directory(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _has_living_writer(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True  # gone, or not ours to touch
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks: nothing can be told, and leftovers must not fill the disk
    finally:
        os.close(descriptor)
    return False


@contextmanager
def said_plainly(path: Path) -> Iterator[None]:
    """Say in one message that a file of a run cannot be written.

    Raises:
        UnwritableError: In place of an OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise UnwritableError(
            f"{path} cannot be written: {error.strerror}. The checkpoints that were saved are whole. Fix: make room or "
            "mend the folder, then run the same command again to resume."
        ) from error


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        logger.debug("this file system has no locks on folders: %s", error)


def _step_of(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else -1
