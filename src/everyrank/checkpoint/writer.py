"""Writing one checkpoint to disk, in a thread beside the training."""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from everyrank.checkpoint.folder import writing, writing_path
from everyrank.checkpoint.manifest import MANIFEST, FileRecord, Manifest, write_file
from everyrank.checkpoint.shards import wait_for_any
from everyrank.checkpoint.snapshot import Group
from everyrank.checkpoint.tensor_file import SUFFIX

logger = logging.getLogger(__name__)

STATE = "state.json"
# How long ranks that write one checkpoint together wait for each other.
PARTNER_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint, ready to be written.

    Attributes:
        step: Optimizer step.
        groups: Files of tensors by group name.
        state: The text of ``state.json``.
        metric: Value it is ranked by, or None.
        world_size: Number of ranks that took it.
        token: Makes the name of the hidden folder unique; the same on all ranks.
        partners: Other ranks that write their parts of spread tensors into the same folder.
    """

    step: int
    groups: Mapping[str, Group]
    state: str
    metric: float | None
    world_size: int
    token: str
    partners: tuple[int, ...] = ()


def write_checkpoint(folder: Path, job: Job) -> None:
    """Write a checkpoint so that it appears whole or not at all.

    Raises:
        OSError: If it cannot be written. Earlier checkpoints are untouched.
    """
    with writing(folder, job.step, job.token) as temporary:
        files = {STATE: write_file(temporary / STATE, [memoryview(job.state.encode())])}
        files.update(_write_groups(temporary, job.groups))
        for rank in job.partners:
            files.update(_take_record(temporary, rank))
        manifest = Manifest(step=job.step, metric=job.metric, world_size=job.world_size, files=files)
        write_file(temporary / MANIFEST, [memoryview(manifest.to_text().encode())])


def write_parts(folder: Path, job: Job, rank: int) -> None:
    """Write a rank's parts of spread tensors into the folder in which rank 0 writes the checkpoint.

    Raises:
        OSError: If they cannot be written, or rank 0 has given up.
    """
    temporary = writing_path(folder, job.step, job.token)
    wait_for_any([temporary], "rank 0's folder", PARTNER_TIMEOUT_S)
    try:
        records = _write_groups(temporary, job.groups)
        draft = temporary / f"rank-{rank:05d}.draft"
        text = json.dumps({name: asdict(record) for name, record in records.items()})
        write_file(draft, [memoryview(text.encode())])
        os.rename(draft, temporary / f"rank-{rank:05d}.json")
    except BaseException:
        with suppress(OSError):
            (temporary / f"rank-{rank:05d}.failed").touch()
        raise


def _take_record(temporary: Path, rank: int) -> dict[str, FileRecord]:
    done, failed = (temporary / f"rank-{rank:05d}.{suffix}" for suffix in ("json", "failed"))
    if wait_for_any([done, failed], f"rank {rank}'s part", PARTNER_TIMEOUT_S) == failed:
        raise OSError(f"rank {rank} could not write its part; its log says why")
    records = json.loads(done.read_text(encoding="utf-8"))
    done.unlink()
    return {name: FileRecord(**record) for name, record in records.items()}


def _write_groups(temporary: Path, groups: Mapping[str, Group]) -> dict[str, FileRecord]:
    return {
        name + SUFFIX: write_file(temporary / (name + SUFFIX), [memoryview(group.header), group.data.numpy().data])
        for name, group in groups.items()
    }


class BackgroundTask:
    """Runs one task at a time in a thread and keeps its error for whoever asks.

    The thread stays for the next task: on a busy machine, starting one has been seen to take longer than the copy of
    50 MB that a checkpoint waits for. It does not keep the interpreter from exiting, but an exit waits for its task.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], str] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._process = os.getpid()
        self._error: BaseException | None = None

    def start(self, task: Callable[[], None], *, name: str) -> None:
        """Run ``task`` in the thread. The last one must have been waited for."""
        assert self._idle.is_set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="everyrank-checkpoint", daemon=True)
            self._thread.start()
            atexit.register(self.wait)
        self._idle.clear()
        self._tasks.put((task, name))

    def wait(self) -> None:
        """Wait until the task is done, whether it failed or not."""
        if os.getpid() == self._process:  # a forked child has no such thread, and nothing to wait for
            self._idle.wait()

    def close(self) -> None:
        """Wait for the task and end the thread. Another ``start`` makes a new one."""
        self.wait()
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None
            atexit.unregister(self.wait)

    def take_error(self) -> BaseException | None:
        """Return the error of a task that failed, once."""
        error, self._error = self._error, None
        return error

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, name = item
            try:
                task()
            except BaseException as error:  # it belongs to the training thread, which asks for it
                logger.error("%s failed: %s", name, error)
                self._error = error
            del item, task  # they hold the memory of the copy
            self._idle.set()
