"""Saving, finding and loading checkpoints of a training run, on all ranks together."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch

from everyrank.checkpoint.encoding import encode_json
from everyrank.checkpoint.finite import flag_not_finite, name_not_finite, say_names
from everyrank.checkpoint.folder import (
    CheckpointInfo,
    checkpoint_name,
    checkpoint_paths,
    describe,
    first_whole,
    identify,
    list_checkpoints,
    new_token,
    remove_leftovers,
    set_aside,
)
from everyrank.checkpoint.objects import Stateful, named_parameters, put_states, take_states
from everyrank.checkpoint.reading import LoadedCheckpoint, read_checkpoint
from everyrank.checkpoint.retention import Retention
from everyrank.checkpoint.rng import capture_rng, restore_rng
from everyrank.checkpoint.shards import MARK, OWN, Layout, is_spread, local_parts, own_name, shard_name
from everyrank.checkpoint.snapshot import Snapshot, whole_tensors
from everyrank.checkpoint.writer import BackgroundTask, Job, write_checkpoint, write_parts
from everyrank.errors import CheckpointError, UnwritableError
from everyrank.runtime.agreement import agree, gather_agreed
from everyrank.runtime.collectives import gather_objects, reduce_sum
from everyrank.runtime.world import World

logger = logging.getLogger(__name__)

Tensors = dict[str, dict[str, torch.Tensor]]
_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class _Report(NamedTuple):
    """What one rank tells the others before a checkpoint is written."""

    rank_state: Any
    layout: Layout
    token: str
    has_own: bool

    @property
    def writes(self) -> bool:
        """Whether the rank writes a file."""
        return any(self.layout.values()) or self.has_own


class Checkpointer:
    """Writes a run's checkpoints, finds the newest whole one, and loads it.

    Every rank constructs one, and every rank calls ``save``, ``latest``, ``best`` and ``load``; rank 0 writes.

    ``save`` returns as soon as the tensors are copied; a thread writes them to disk. An error of that thread (a full
    disk, say) is raised once: by the next ``save`` on all ranks, or before that by ``check``, ``wait`` or ``close`` on
    rank 0. The checkpoints written before are whole in any case.

    Args:
        folder: Where the checkpoints live, for example ``<run>/checkpoints``. Made if missing.
        world: The joined world.
        keep_last: Keep this many of the newest; None keeps all.
        keep_best: Keep this many with the best metric.
        keep_every: Keep those whose step is a multiple of this; 0 for none.
        metric_mode: ``"min"`` or ``"max"``: which metric is better.
        background: Write in a thread. If false, ``save`` returns when the checkpoint is on disk, or raises on all
            ranks.
        sharded: Each rank writes its own parts of distributed tensors (FSDP2), into a folder that all ranks share,
            instead of gathering them whole on rank 0.
        after_write: Called on rank 0, in the writer's thread, with the folder of each checkpoint that is whole on disk.
        prepare: Make the folder ready to be written to now. Otherwise nothing is written until ``prepare`` is called,
            so that the folder of a run that goes on elsewhere can be read.

    Example:
        >>> with Checkpointer(run / "checkpoints", world=world) as checkpointer:
        ...     checkpointer.save(step, tensors={"model": model.state_dict()}, state={"sampler": sampler.state_dict()},
        ...                       rank_state={"rng": capture_rng()})
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        world: World,
        keep_last: int | None = 3,
        keep_best: int = 1,
        keep_every: int = 0,
        metric_mode: Literal["min", "max"] = "min",
        background: bool = True,
        sharded: bool = False,
        after_write: Callable[[Path], None] | None = None,
        prepare: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.world = world
        self.background = background
        self.sharded = sharded
        self._after_write = after_write
        self.retention = Retention(
            keep_last=keep_last, keep_best=keep_best, keep_every=keep_every, metric_mode=metric_mode
        )
        self._snapshot = Snapshot()
        self._task = BackgroundTask()
        self._damaged: list[Path] = []
        if prepare:
            self.prepare()

    def prepare(self) -> None:
        """Make the folder ready to be written to: remove what killed runs left, set aside what was found damaged.

        Raises:
            CheckpointError: On rank 0, which does it, if the folder cannot be used.
        """
        if not self.world.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            self._set_aside_damaged()
        except OSError as error:
            raise CheckpointError(
                f"The folder for checkpoints, {self.folder}, cannot be used: {error}. "
                "Fix: name a folder that can be written to."
            ) from error

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._task.close()
        if kind is None:  # an error that is on its way already must not be hidden by the writer's, which is logged
            self.check()

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        metric: float | None = None,
        own_tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Save a checkpoint. All ranks call it at the same step.

        If a checkpoint of this step exists already, the new one takes its place.

        Args:
            step: Number of optimizer steps done.
            tensors: Groups of tensors by name, each group written to a file of its own. Those of rank 0 are saved;
                distributed tensors (FSDP2) are gathered whole, or written by each rank if ``sharded``.
            state: What else is common to all ranks; rank 0's is saved. Plain values, see ``encode_json``.
            rank_state: This rank's own state, such as its random generators. Plain values.
            metric: Value that ``keep_best`` ranks by.
            own_tensors: What this rank holds by itself. Each rank writes its own, into a folder that all ranks share.
                None, on all ranks, if no rank has any.

        Raises:
            CheckpointError: On all ranks, if the last checkpoint could not be written or this one cannot be taken.
        """
        groups: Tensors = {}

        def collect() -> _Report:
            self._check_names(tensors)
            own, layout = self._own_groups(tensors)  # may be collective: before what one rank alone may refuse
            groups.update(own)
            if own_tensors:
                groups[own_name(self.world.rank)] = dict(own_tensors)
            report = _Report(encode_json(dict(rank_state)), layout, new_token(), bool(own_tensors))
            self.wait()
            return report

        reports = gather_agreed(collect)

        jobs: list[Job] = []

        def copy() -> None:
            job = self._copied(step, groups, state, metric, reports)
            if self.world.is_main or self.world.rank in job.partners:
                jobs.append(job)

        writers = None if self.sharded or own_tensors is not None else 0  # where only rank 0 writes, only it can fail
        agree(copy, on=writers)
        for job in jobs:
            self._task.start(functools.partial(self._write, job), name=f"writing checkpoint {step}")
        if not self.background:
            agree(self.wait, on=writers)

    def _copied(
        self, step: int, groups: Tensors, state: Mapping[str, Any], metric: float | None, reports: list[_Report]
    ) -> Job:
        content = {"state": encode_json(dict(state)) if self.world.is_main else None}
        content["rank_states"] = [report.rank_state for report in reports]
        if self.sharded:
            content["shards"] = [report.layout for report in reports]
        return Job(
            step=step,
            groups=self._snapshot.take(groups),
            state=json.dumps(content, allow_nan=False) if self.world.is_main else "",
            metric=None if metric is None else float(metric),
            world_size=self.world.world_size,
            token=reports[0].token,
            partners=tuple(rank for rank, report in enumerate(reports) if rank and report.writes),
        )

    def _own_groups(self, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> tuple[Tensors, Layout]:
        """Return the tensors that this rank writes, by file, and where its parts of spread ones belong."""
        if not self.sharded:
            groups = {name: whole_tensors(group, keep=self.world.is_main) for name, group in tensors.items()}
            return (groups if self.world.is_main else {}), {}
        files: Tensors = {}
        layout: Layout = {}
        for name, group in tensors.items():
            parts, layout[name] = local_parts(group)
            if parts:
                files[shard_name(name, self.world.rank)] = parts
            plain = {key: tensor.detach() for key, tensor in group.items() if not is_spread(tensor)}
            if self.world.is_main and (plain or not group):
                files[name] = plain
        return files, layout

    def _write(self, job: Job) -> None:
        """Write a checkpoint, or this rank's parts of it; runs in the thread."""
        self._snapshot.synchronize()
        if self.world.is_main:
            write_checkpoint(self.folder, job)
            self.retention.apply(self.folder)
            if self._after_write is not None:
                self._call_after_write(self.folder / checkpoint_name(job.step))
        else:
            write_parts(self.folder, job, self.world.rank)

    def _call_after_write(self, path: Path) -> None:
        assert self._after_write is not None
        try:
            self._after_write(path)
        except Exception as error:
            raise CheckpointError(
                f"{path} is saved, but what was to be done with it then failed: {type(error).__name__}: {error}"
            ) from error

    def check(self) -> None:
        """Raise the writer's error, if it has had one. Not collective and without waiting: cheap enough for every step.

        Raises:
            CheckpointError: On rank 0, if the last checkpoint could not be written.
        """
        error = self._task.take_error()
        if isinstance(error, CheckpointError):
            raise error
        if error is not None:
            kind = UnwritableError if isinstance(error, OSError) else CheckpointError
            raise kind(
                f"The last checkpoint could not be written to {self.folder}: {error}. Earlier checkpoints are whole. "
                "Fix: make room or mend the folder, then run the same command again to resume."
            )

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Not collective; other ranks than 0 have nothing to wait for.

        Raises:
            CheckpointError: On rank 0, if it could not be written.
        """
        self._task.wait()
        self._set_aside_damaged()
        self.check()

    def close(self) -> None:
        """Wait as ``wait`` does, and end the thread. Nothing is lost without it, but an error would only be logged."""
        self._task.close()
        self.check()

    def latest(self) -> CheckpointInfo | None:
        """Return the newest checkpoint that is whole, or None; damaged ones are named in the log and skipped.

        Rank 0 compares all checksums and decides; all ranks get its answer.
        """
        self._task.wait()
        return agree(self._newest_whole, on=0)

    def best(self) -> CheckpointInfo | None:
        """Return the whole checkpoint with the best metric, or None. Rank 0 decides; all ranks get its answer."""
        self._task.wait()

        def find() -> CheckpointInfo | None:
            ranked = self.retention.best(list_checkpoints(self.folder, verify=False))
            return first_whole(info.path for info in ranked)[0]

        return agree(find, on=0)

    def load(self, checkpoint: CheckpointInfo | Path | str) -> LoadedCheckpoint:
        """Load a checkpoint on all ranks, at any world size. Nothing in it is executed.

        Args:
            checkpoint: What ``latest`` or ``best`` returned, or the path of a checkpoint's folder, which is verified.

        Raises:
            CheckpointError: On all ranks, if it is damaged.
        """
        info = checkpoint if isinstance(checkpoint, CheckpointInfo) else None
        path = Path(checkpoint) if info is None else info.path  # type: ignore[arg-type]
        if not (info and info.verified):
            agree(lambda: _require_whole(path), on=0)
        copies = gather_objects(identify(path, verify=self.world.is_local_main and not self.world.is_main))
        other = [rank for rank, copy in enumerate(copies) if copy != copies[0]]
        if not other:
            return read_checkpoint(path)
        # Folders of the nodes' own: all ranks get rank 0's, and not what they have under the same name.
        different = [rank for rank in other if copies[rank]]
        if different and self.world.is_main:
            logger.warning(
                "%s is another checkpoint on rank %s than on rank 0, whose is taken. Fix: put the run's folder on a "
                "file system that all nodes share, or remove what an earlier run left on those nodes.",
                *(path, ", ".join(map(str, different))),
            )
        loaded = agree(lambda: read_checkpoint(path), on=0)
        return replace(loaded, own_ranks=frozenset())  # the files of single ranks lie in rank 0's folder

    def save_objects(self, step: int, *, metric: float | None = None, **objects: Stateful) -> None:
        """Save objects that have a ``state_dict``, and each rank's random generators; otherwise as ``save``.

        Args:
            step: Number of optimizer steps done.
            metric: Value that ``keep_best`` ranks by.
            **objects: The objects by name, for example ``model=model, optimizer=optimizer, sampler=sampler``.

        Raises:
            CheckpointError: On all ranks, as ``save``; also if a parameter of a module is NaN or infinite on one. To
                save it all the same, give its ``state_dict`` to ``save``, which stores what it is given.
        """
        parameters = named_parameters(objects)
        if parameters and reduce_sum(flag_not_finite(parameters.values())).item():
            found = gather_objects(say_names(name_not_finite(parameters)))
            rank = next(rank for rank, names in enumerate(found) if names)
            raise CheckpointError(
                f"The weights are not finite at step {step} on rank {rank}: {found[rank]}. They are not saved; the "
                "last checkpoint is whole. Fix: leave out steps whose gradients are not finite (clip_grad_norm_ "
                "returns their norm), or look at the learning rate."
            )
        tensors, state = take_states(objects)
        self.save(step, tensors=tensors, state=state, rank_state={"rng": capture_rng()}, metric=metric)

    def resume(self, **objects: Stateful) -> int:
        """Put the newest whole checkpoint's states back into these objects; the counterpart of ``save_objects``.

        Random generators go on where they were if the world has the size it had; at another size they are left alone.

        Returns:
            The step to go on from; 0, and nothing is changed, if there is no checkpoint yet.
        """
        info = self.latest()
        if info is None:
            return 0
        loaded = self.load(info)
        put_states(objects, loaded.tensors, loaded.state)
        if loaded.world_size == self.world.world_size:
            restore_rng(loaded.rank_states[self.world.rank].get("rng", {}))
        logger.info("resuming from %s", info.path)
        return loaded.step

    def _newest_whole(self) -> CheckpointInfo | None:
        found, damaged = first_whole(reversed(checkpoint_paths(self.folder)))
        self._damaged += (info.path for info in damaged)
        return found

    def _set_aside_damaged(self) -> None:
        """Keep those that were found damaged from being counted: retention would delete whole ones in their favour."""
        while self._damaged:
            set_aside(self._damaged.pop())

    def _check_names(self, groups: Mapping[str, object]) -> None:
        for name in groups:
            if not _GROUP_NAME.fullmatch(name) or MARK in name or name.startswith(OWN):
                raise CheckpointError(
                    f"The group of tensors {name!r} cannot be a file's name. Use letters, digits, '_', '-' and '.', "
                    f"not {MARK!r}, and not {OWN!r} at the start."
                )


def _require_whole(path: Path) -> None:
    found = describe(path, verify=True)
    if not found.verified:
        raise CheckpointError(f"The checkpoint {path} cannot be loaded: {found.reason}. Use an earlier one.")
