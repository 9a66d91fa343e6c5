"""A checkpoint's model as a single file, for fine-tuning and for other programs."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

import safetensors.torch
import torch

from everyrank.checkpoint.folder import checkpoint_paths, describe
from everyrank.checkpoint.reading import group_names, read_group
from everyrank.checkpoint.tensor_file import SUFFIX
from everyrank.errors import CheckpointError, UserError, did_you_mean

logger = logging.getLogger(__name__)

_PICKLED = (".pth", ".pt")


def export(path: Path | str, out: Path | str, *, group: str = "model") -> Path:
    """Write one group of a checkpoint's tensors to a single file.

    Args:
        path: A checkpoint's folder; or a folder of checkpoints, or of a run, whose newest whole one is taken.
        out: Where to write. ``.safetensors``, or ``.pth`` / ``.pt`` for a plain dict of tensors as ``torch.save``
            writes it (``torch.load(out, weights_only=True)`` reads it). An existing file is replaced in one step.
        group: Which tensors: ``"model"``, or another name that was given to ``Checkpointer.save``.

    Returns:
        The path written.

    Raises:
        UserError: If ``out`` has another suffix, or the checkpoint has no such group.
        CheckpointError: If there is no whole checkpoint.
    """
    source, target = Path(path), Path(out)
    if target.suffix not in (SUFFIX, *_PICKLED):
        raise UserError(
            f"The file to export to is {target.name!r}, whose suffix names no known format. "
            "Use .safetensors, or .pth for a dict of tensors as torch.save writes it."
        )
    checkpoint = _find(source)
    groups = group_names(checkpoint)
    if group not in groups:
        raise UserError(
            f"The group {group!r} was asked for, but {checkpoint} holds {', '.join(groups) or 'no tensors'}."
            + did_you_mean(group, groups)
        )
    tensors = read_group(checkpoint, group)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        if target.suffix == SUFFIX:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
        else:
            torch.save(tensors, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _find(source: Path) -> Path:
    candidates = checkpoint_paths(source) or checkpoint_paths(source / "checkpoints") or [source]
    reasons: list[str] = []
    for candidate in reversed(candidates):
        info = describe(candidate, verify=True)
        if info.verified:
            for reason in reasons:
                logger.warning("skipping the damaged checkpoint %s", reason)
            if reasons:
                logger.warning("exporting %s instead", candidate)
            return candidate
        reasons.append(f"{candidate}: {info.reason}")
    raise CheckpointError("There is no whole checkpoint to export. Found:\n  " + "\n  ".join(reasons))
