"""Saving a run and going on with it: everyrank's verified checkpoints and legacy files, side by side."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from everyrank.apps.video_restoration.checkpoints import LegacyCheckpoint, newest_legacy, save_legacy
from everyrank.checkpoint.checkpointer import Checkpointer, LoadedCheckpoint
from everyrank.checkpoint.encoding import flatten_state, unflatten_state
from everyrank.checkpoint.rng import capture_rng, restore_rng
from everyrank.errors import CheckpointError, ConfigError
from everyrank.runtime.collectives import broadcast_decision

if TYPE_CHECKING:
    from everyrank.apps.video_restoration.task import Run

logger = logging.getLogger(__name__)


class Persistence:
    """Saves and resumes one run. All ranks make one and call its methods together.

    Args:
        run: The run.

    Attributes:
        metric: PSNR of the last validation, by which the best checkpoint is kept.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.models = Path(run.options["path"]["models"])
        self.metric: float | None = None
        self._random_state: dict[str, Any] | None = None
        self._checkpointer = Checkpointer(run.folder / "checkpoints", world=run.world, keep_last=2, metric_mode="max")

    def __enter__(self) -> Persistence:
        self._checkpointer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._checkpointer.__exit__(kind, error, traceback)

    def start(self) -> None:
        """Go on from the newest checkpoint that loads: an exact one, or a newer legacy one (put there by hand, say)."""
        if self.run.sampler is None:
            return
        info = self._checkpointer.latest()
        exact = self._checkpointer.load(info) if info is not None else None
        step = exact.step if exact is not None else 0
        # rank 0 looks and decides; the others read the file that it found
        newest = newest_legacy(self.models, self.run.network, after=step) if self.run.world.is_main else None
        iteration = broadcast_decision(newest.iteration if newest is not None else None)
        if iteration is not None:
            if newest is None:
                newest = newest_legacy(self.models, self.run.network, after=iteration - 1)
            if newest is None or newest.iteration != iteration:
                raise CheckpointError(
                    f"rank 0 read {self.models}/{iteration}_G.pth, but this rank cannot: share the folder"
                )
            self._load_legacy(newest)
        elif exact is not None:
            self._load_exact(exact)
        self.run.history.cut(self.run.iteration)

    def _load_exact(self, saved: LoadedCheckpoint) -> None:
        run = self.run
        own, found = set(run.network.state_dict()), set(saved.tensors["model"])
        if own != found:
            raise ConfigError(
                f"the checkpoint {saved.path} does not fit the network that the options describe: give this run "
                "another task name, or the netG section it was begun with",
                sorted(own ^ found)[:8],
            )
        run.network.load_state_dict(saved.tensors["model"])
        if run.average is not None:
            run.average.load_state_dict(saved.tensors.get("average") or saved.tensors["model"])
        if run.train_options["G_optimizer_reuse"]:
            run.optimizer.load_state_dict(unflatten_state(saved.tensors["optimizer"], saved.state["optimizer"]))
        assert run.sampler is not None
        run.sampler.load_state_dict(saved.state["sampler"])
        if run.world.is_main:  # sums over ranks: kept on one of them
            run.window.copy_(run.window.new_tensor(saved.state["window"]))
        run.iteration = saved.step
        if saved.world_size == run.world.size:
            self._random_state = saved.rank_states[run.world.rank]
        logger.info("resumed exactly at iteration %d from %s", saved.step, saved.path)

    def _load_legacy(self, saved: LegacyCheckpoint) -> None:
        run = self.run
        run.network.load_state_dict(saved.network)
        if run.average is not None:
            run.average.load_state_dict(saved.average if saved.average is not None else saved.network)
        if run.train_options["G_optimizer_reuse"] and saved.optimizer is not None:
            try:
                run.optimizer.load_state_dict(dict(saved.optimizer))
            except (ValueError, KeyError) as error:
                raise ConfigError(
                    f"{self.models}/{saved.iteration}_optimizerG.pth does not fit this optimizer ({error}): set "
                    "fix_iter, fix_keys and fix_lr_mul as they were, or G_optimizer_reuse to false"
                ) from error
        assert run.sampler is not None
        epoch, batch = divmod(saved.iteration, len(run.sampler))
        run.sampler.set_epoch(epoch)
        run.sampler.commit(batch)
        run.iteration = saved.iteration
        logger.info("resumed at iteration %d from %s (legacy: random state starts anew)", saved.iteration, self.models)

    def restore_random_state(self) -> None:
        """Let this rank draw what it would have drawn, if the run goes on at the same world size."""
        if self._random_state is not None:
            restore_rng(self._random_state)
            self._random_state = None

    def save(self) -> None:
        """Save the run's state under both names. Collective."""
        run = self.run
        assert run.sampler is not None
        optimizer = run.optimizer.state_dict()
        tensors, rest = flatten_state(optimizer)
        groups = {"model": run.network.state_dict(), "optimizer": tensors}
        if run.average is not None:
            groups["average"] = run.average.state_dict()
        sums = run.window_sums()
        run.window.copy_(sums if run.world.is_main else sums.new_zeros(2))
        self._checkpointer.save(
            run.iteration,
            tensors=groups,
            state={"optimizer": rest, "sampler": run.sampler.state_dict(), "window": sums.tolist()},
            rank_state=capture_rng(),
            metric=self.metric,
        )
        problem = None
        if run.world.is_main:
            average = run.average.state_dict() if run.average is not None else None
            try:
                save_legacy(self.models, run.iteration, run.network.state_dict(), average, optimizer)
            except OSError as error:
                problem = f"{self.models}: iteration {run.iteration} cannot be saved ({error}); make room and resume"
        problem = broadcast_decision(problem)
        if problem:
            raise CheckpointError(problem)
        logger.info("saved iteration %d", run.iteration)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self._checkpointer.wait()
