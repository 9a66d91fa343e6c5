"""Saves while files may not grow beyond a limit, as on a full disk, and reports what happened.

    python full_disk.py FOLDER LIMIT_BYTES|none BACKGROUND

Prints one line of JSON: the error of the save, and the error of doing it again with the limit gone.
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


def main(folder: Path, limit: int | None, background: bool) -> None:
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
    print(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]), None if sys.argv[2] == "none" else int(sys.argv[2]), sys.argv[3] == "True")
