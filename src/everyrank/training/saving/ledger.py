"""The ledger: which samples each committed optimizer step used, on which rank.

A step is committed when a checkpoint that contains it is whole on the disk; until then a kill would undo it. Lines for
steps since the last checkpoint are therefore written beside it under the name ``step-<step>.pending`` and get the name
``step-<step>.jsonl`` once the checkpoint is durable. A resumed run confirms or removes what is pending. So the files
``ledger/step-*.jsonl`` together hold each sample of each epoch exactly once, and anyone can count.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from everyrank.checkpoint.folder import said_plainly
from everyrank.runtime.agreement import agree
from everyrank.runtime.collectives import gather_objects
from everyrank.runtime.world import World

_NAME = re.compile(r"step-(\d+)\.(jsonl|pending)")


class Ledger:
    """Writes the ledger of a run. Every rank has one; rank 0 writes.

    Args:
        folder: ``<run>/ledger``.
        world: The joined world.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self._entries: list[dict[str, Any]] = []
        self._pending: list[Path] = []
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, epoch: int, samples: Sequence[int]) -> None:
        """Note the samples that this rank used in an optimizer step."""
        self._entries.append(
            {
                "step": step,
                "epoch": epoch,
                "rank": self.world.rank,
                "world_size": self.world.world_size,
                "samples": [int(sample) for sample in samples],
            }
        )

    def write_pending(self, step: int) -> None:
        """Write what was noted since the last checkpoint, before the one at ``step`` is saved. Collective.

        Raises:
            UnwritableError: On all ranks.
        """
        gathered = gather_objects(self._entries)
        self._entries = []
        entries = sorted((e for part in gathered for e in part), key=lambda e: (e["step"], e["rank"]))
        if entries:
            agree(lambda: self._write(self.folder / f"step-{step:08d}.pending", entries), on=0)

    def _write(self, path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        with said_plainly(path):
            replace_file(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        self._pending.append(path)

    def confirm(self, up_to: int) -> None:
        """Commit the pending steps up to ``up_to``, whose checkpoint is durable. Rank 0 acts."""
        waiting = []
        for path in self._pending:
            if _step_of(path) <= up_to:
                os.replace(path, path.with_suffix(".jsonl"))
            else:
                waiting.append(path)
        self._pending = waiting

    def resume(self, step: int) -> None:
        """Make the folder agree with a checkpoint: confirm what it contains, remove what it does not. Rank 0 acts."""
        self._entries, self._pending = [], []
        if not self.world.is_main:
            return
        for path in sorted(self.folder.iterdir()):
            if path.suffix == ".tmp":
                path.unlink()  # cut off by a kill while it was written
            if _NAME.fullmatch(path.name) is None:
                continue
            if _step_of(path) > step:
                path.unlink()
            elif path.suffix == ".pending":
                os.replace(path, path.with_suffix(".jsonl"))


def read_ledger(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the committed entries in the order of steps: ``step, epoch, rank, world_size, samples``."""
    for path in sorted(folder.glob("step-*.jsonl"), key=_step_of):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def replace_file(path: Path, text: str) -> None:
    """Write a text file so that it is there whole, or as it was."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
