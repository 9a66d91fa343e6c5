"""A checkpoint's model as a single file, for fine-tuning and for other programs."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

import torch

from everyrank.checkpoint.finite import name_not_finite, say_names
from everyrank.checkpoint.folder import checkpoint_paths, first_whole
from everyrank.checkpoint.reading import StoredCheckpoint
from everyrank.checkpoint.tensor_file import SUFFIX, write_one_by_one
from everyrank.errors import CheckpointError, UserError, did_you_mean

logger = logging.getLogger(__name__)

_PICKLED = (".pth", ".pt")


def export(path: Path | str, out: Path | str, *, group: str = "model", allow_non_finite: bool = False) -> Path:
    """Write one group of a checkpoint's tensors to a single file.

    A ``.safetensors`` file is read and written tensor by tensor.

    Args:
        path: A checkpoint's folder; or a folder of checkpoints, or of a run, whose newest whole one is taken.
        out: Where to write. ``.safetensors``, or ``.pth`` / ``.pt`` for a plain dict of tensors as ``torch.save``
            writes it (``torch.load(out, weights_only=True)`` reads it). An existing file is replaced in one step.
        group: Which tensors: ``"model"``, or another name that was given to ``Checkpointer.save``.
        allow_non_finite: Write tensors that hold NaN or infinity too, such as a mask of ``-inf``.

    Returns:
        The path written.

    Raises:
        UserError: If ``out`` has another suffix, or the checkpoint has no such group.
        CheckpointError: If there is no whole checkpoint, or it holds a tensor that is not finite.
    """
    source, target = Path(path), Path(out)
    if target.suffix not in (SUFFIX, *_PICKLED):
        raise UserError(
            f"The file to export to is {target.name!r}, whose suffix names no known format. "
            "Use .safetensors, or .pth for a dict of tensors as torch.save writes it."
        )
    checkpoint = _find(source)
    found = StoredCheckpoint(checkpoint)
    if group not in found.groups:
        raise UserError(
            f"The group {group!r} was asked for, but {checkpoint} holds {', '.join(found.groups) or 'no tensors'}."
            + did_you_mean(group, found.groups)
        )
    stored = found.group(group)
    not_finite: list[str] = []

    def read(name: str) -> torch.Tensor:
        tensor = stored.read(name)
        not_finite.extend(name_not_finite({name: tensor}))
        return tensor

    # Each tensor is read once, so whether all are finite is known when they are written: no folder is made before.
    there = next(folder for folder in target.absolute().parents if folder.is_dir())
    temporary = there / f".{target.name}.{secrets.token_hex(4)}"
    try:
        if target.suffix == SUFFIX:
            write_one_by_one(temporary, stored.tensors, read)
        else:
            torch.save({name: read(name) for name in stored.tensors}, temporary)
        if not_finite and not allow_non_finite:
            raise CheckpointError(
                f"{checkpoint} holds NaN or infinity in {say_names(not_finite)}. Fix: export an earlier checkpoint; "
                "or, if that is meant (a mask), allow it: --allow-non-finite (allow_non_finite=True)."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _find(source: Path) -> Path:
    candidates = checkpoint_paths(source) or checkpoint_paths(source / "checkpoints") or [source]
    found, damaged = first_whole(reversed(candidates))
    if found is None:
        reasons = (f"{info.path}: {info.reason}" for info in damaged)
        raise CheckpointError("There is no whole checkpoint to export. Found:\n  " + "\n  ".join(reasons))
    if damaged:
        logger.warning("exporting %s instead", found.path)
    return found.path
