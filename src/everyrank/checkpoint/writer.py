"""Writing one checkpoint to disk, in a thread beside the training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from everyrank.checkpoint.folder import writing
from everyrank.checkpoint.manifest import MANIFEST, Manifest, write_file
from everyrank.checkpoint.snapshot import Group
from everyrank.checkpoint.tensor_file import SUFFIX

logger = logging.getLogger(__name__)

STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint, ready to be written.

    Attributes:
        step: Optimizer step.
        groups: Files of tensors by group name.
        state: The text of ``state.json``.
        metric: Value it is ranked by, or None.
        world_size: Number of ranks that took it.
    """

    step: int
    groups: Mapping[str, Group]
    state: str
    metric: float | None
    world_size: int


def write_checkpoint(folder: Path, job: Job) -> None:
    """Write a checkpoint so that it appears whole or not at all.

    Raises:
        OSError: If it cannot be written. Earlier checkpoints are untouched.
    """
    with writing(folder, job.step) as temporary:
        files = {STATE: write_file(temporary / STATE, [memoryview(job.state.encode())])}
        for name, group in job.groups.items():
            parts = [memoryview(group.header), group.data.numpy().data]
            files[name + SUFFIX] = write_file(temporary / (name + SUFFIX), parts)
        manifest = Manifest(step=job.step, metric=job.metric, world_size=job.world_size, files=files)
        write_file(temporary / MANIFEST, [memoryview(manifest.to_text().encode())])


class BackgroundTask:
    """Runs one task at a time in a thread and keeps its error for whoever asks.

    The threads are not daemons: the interpreter waits for the last one before it exits, so nothing is lost.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, task: Callable[[], None], *, name: str) -> None:
        """Run ``task`` in a thread. The last one must have been waited for."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(task,), name=name)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the task is done, whether it failed or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_error(self) -> BaseException | None:
        """Return the error of a task that failed, once."""
        error, self._error = self._error, None
        return error

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # it belongs to the training thread, which asks for it
            logger.error("%s failed: %s", threading.current_thread().name, error)
            self._error = error
