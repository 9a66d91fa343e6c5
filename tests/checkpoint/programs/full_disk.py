"""Saves while files may not grow beyond a limit, as on a full disk, and reports what happened.

    python full_disk.py (FOLDER LIMIT_BYTES|none BACKGROUND)...

Prints one line of JSON: for each, the error of the save, and the error of doing it again with the limit gone.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from everyrank import current_world
from everyrank.checkpoint.checkpointer import Checkpointer
from everyrank.errors import CheckpointError


def errors_of(folder: Path, limit: int | None, background: bool) -> list[str]:
    checkpointer = Checkpointer(folder, world=current_world(), background=background)
    tensors = {"model": {"w": torch.arange(50_000)}}
    checkpointer.save(1, tensors=tensors, state={}, rank_state={})
    checkpointer.wait()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    errors = []
    for step in (2, 3):
        error = ""
        try:
            checkpointer.save(step, tensors=tensors, state={}, rank_state={})
            checkpointer.wait()
        except CheckpointError as caught:
            error = str(caught)
        errors.append(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpointer.close()
    return errors


if __name__ == "__main__":
    asked = zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True)
    print(json.dumps([errors_of(Path(f), None if n == "none" else int(n), b == "True") for f, n, b in asked]))
