"""One step of one rank of a run again, in one process: the trainer's side of ``everyrank replay``.

The command runs the program of the run in a folder that has one checkpoint. In the first of its two parts, where that
checkpoint is not of the step before, all ranks train up to there. In the second, one process takes the rank's batch and
randomness, does the step, and ends.
"""

from __future__ import annotations

import json
import os
import pdb
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from everyrank.checkpoint.checkpointer import LoadedCheckpoint
from everyrank.checkpoint.rng import restore_rng
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import EXIT_OK, CheckpointError, ConfigError
from everyrank.training.config import TrainerConfig
from everyrank.training.failures import describe_samples
from everyrank.training.loaders import sampler_of
from everyrank.training.parallel.shares import given_shares
from everyrank.training.step import TrainStep

VARIABLE = "EVERYRANK_REPLAY"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What is to be run again.

    Attributes:
        folder: Stands for the trainer's folder: it holds the checkpoint to go on from, and takes what is written.
        step: The optimizer step, from 1.
        rank: The rank whose step it is; None: all ranks train up to the step before, and save.
        world_size: Number of ranks of the run.
        debug: Stop in ``pdb`` before the step.
    """

    folder: str
    step: int
    rank: int | None
    world_size: int
    debug: bool = False

    @classmethod
    def asked(cls) -> Replay | None:
        """What the command asks of this process, or None."""
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None

    def variable(self) -> dict[str, str]:
        """The variable by which a process is asked."""
        return {VARIABLE: json.dumps(asdict(self))}


def folder_of(path: Path) -> Path:
    """The trainer's folder: the configured one, or the one that stands for it while a step is run again."""
    replay = Replay.asked()
    return path if replay is None else Path(replay.folder)


def is_one_rank() -> bool:
    """Whether this process stands for one rank of a run with several."""
    replay = Replay.asked()
    return replay is not None and replay.rank is not None


def replay_if_asked(config: TrainerConfig, saved: LoadedCheckpoint | None, step: TrainStep, loader: Any) -> int | None:
    """Do one rank's step as it was done in the run, and end the program; or say after which step all ranks are to end.

    Args:
        config: The whole configuration.
        saved: The checkpoint that the trainer has loaded.
        step: Takes an optimizer step.
        loader: The training loader; its sampler is at the step.

    Returns:
        The step, or None if nothing is asked.

    Raises:
        SystemExit: The step is done.
        CheckpointError: The checkpoint is not of the step before.
        ConfigError: One rank cannot do the steps of this run alone.
    """
    replay = Replay.asked()
    if replay is None:
        return None
    parallel = config.parallel
    if parallel is not None and (parallel.local_updates is not None or parallel.strategy != "ddp"):
        what = "parallel.local_updates" if parallel.local_updates is not None else "parallel.strategy: fsdp2"
        raise ConfigError(f"the run has {what}: a rank of it cannot do a step alone. Fix: replay runs of plain DDP.")
    if parallel is not None and parallel.shares == "measured":
        raise ConfigError(
            "the run has parallel.shares: measured, so that no other run shares its batches alike. Fix: replay runs "
            "whose shares are even or a list."
        )
    if replay.rank is None:
        return replay.step - 1
    if saved is None or saved.step != replay.step - 1:
        raise CheckpointError(f"step {replay.step} cannot be run again: {replay.folder} is not at the step before.")
    sampler = sampler_of(loader, "the training loader")
    sampler.rank, sampler.world_size = replay.rank, replay.world_size
    sampler.set_shares(given_shares(parallel, replay.world_size))
    restore_rng(saved.rank_states[replay.rank]["rng"], step.device)
    step.model.train()
    _do(replay, sampler, config.training.accumulation_steps, step, step.feed.of(loader))
    raise SystemExit(EXIT_OK)


def _do(
    replay: Replay, sampler: GlobalBatchSampler, accumulation_steps: int, step: TrainStep, batches: Iterator[Any]
) -> None:
    """Do the step that begins at the cursor and say what came of it."""
    first = sampler.next_batch
    of_the_step = range(first, min(first + accumulation_steps, len(sampler)))
    weights, _ = sampler.loss_weights(of_the_step)
    gradients: dict[str, float] = {}
    for name, parameter in step.module.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_noting(gradients, name))
    who = f"replay: rank {replay.rank} of {replay.world_size}, step {replay.step}"
    print(f"{who}: samples {describe_samples(sampler.local_samples(of_the_step))}", flush=True)
    if replay.debug:
        pdb.set_trace()
    loss = float(step(batches, weights))
    norm = sum(gradients.values()) ** 0.5
    print(f"{who}: loss {loss / max(sum(weights), 1e-300)!r}, norm of the rank's own gradient {norm!r}", flush=True)


def _noting(gradients: dict[str, float], name: str) -> Any:
    def note(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradients[name] = float(parameter.grad.detach().double().square().sum())

    return note
