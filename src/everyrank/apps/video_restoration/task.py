"""A run of video restoration: build, resume, train by iterations, validate, save.

What the run holds lives in :class:`Run`; ``train`` reads top to bottom.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everyrank.apps.video_restoration.agreement import together
from everyrank.apps.video_restoration.data.datasets import TestDataset, TrainDataset
from everyrank.apps.video_restoration.data.demo import resolve_demo
from everyrank.apps.video_restoration.history import History
from everyrank.apps.video_restoration.losses import build_loss
from everyrank.apps.video_restoration.network.vrt import VRT
from everyrank.apps.video_restoration.optimisation import freeze, set_learning_rate, update_average
from everyrank.apps.video_restoration.persistence import Persistence
from everyrank.apps.video_restoration.setup import build_model, describe
from everyrank.apps.video_restoration.validation import Validation, validate, write_side_by_side
from everyrank.data.loader import make_loader
from everyrank.data.randomness import SeededDataset
from everyrank.data.sampler import GlobalBatchSampler, Share
from everyrank.errors import EveryrankError, Preempted
from everyrank.runtime.collectives import reduce_sum
from everyrank.runtime.preemption import PreemptionWatch
from everyrank.runtime.world import World
from everyrank.training.parallel.config import ParallelConfig
from everyrank.training.parallel.wrapping import wrap
from everyrank.training.seeding import seed_everywhere, seed_rank

logger = logging.getLogger(__name__)


class Run:
    """Everything a run holds between iterations.

    Args:
        options: Resolved options.
        world: The joined world.

    Attributes:
        iteration: Iterations done.
        network: The network.
        average: Its moving average, or None.
    """

    def __init__(self, options: dict[str, Any], world: World) -> None:
        self.options, self.world = options, world
        self.train_options: dict[str, Any] = options["train"]
        self.folder = Path(options["path"]["task"])
        self.iteration = 0
        noise_map = options["netG"]["nonblind_denoising"]
        sections = options["datasets"]
        self.test_data = None
        if "test" in sections:
            interpolation = options["netG"]["pa_frames"] == 0
            self.test_data = TestDataset(sections["test"], noise_map=noise_map, interpolation=interpolation)
        seed_everywhere(self.train_options["manual_seed"])
        self.network, self.average, self.optimizer = build_model(options, world.device)
        self.sampler: GlobalBatchSampler | None = None
        if "train" in sections and self.train_options["total_iter"] > 0:
            data = TrainDataset(sections["train"], noise_map=noise_map)
            self._prepare_training(data, sections["train"])
        self.loss = build_loss(self.train_options)
        self.history = History(self.folder / "history.jsonl", active=world.is_main)
        self.window = torch.zeros(2, dtype=torch.float64, device=world.device)  # sum of losses, number of samples

    def _prepare_training(self, data: TrainDataset, section: Mapping[str, Any]) -> None:
        world, seed = self.world, self.train_options["manual_seed"]
        self.sampler = GlobalBatchSampler(
            len(data),
            global_batch_size=section["dataloader_batch_size"],
            rank=world.rank,
            world_size=world.size,
            seed=seed,
            shuffle=section["dataloader_shuffle"],
        )
        self.loader = make_loader(
            SeededDataset(data, seed),
            self.sampler,
            num_workers=-(-section["dataloader_num_workers"] // world.size),
            pin_memory=world.device.type == "cuda",
        )

    def batches(self) -> Iterator[tuple[dict[str, Any], Share]]:
        """Yield batches from the cursor on, epoch after epoch, with this rank's share of each."""
        assert self.sampler is not None
        while True:
            first = self.sampler.next_batch
            random_state = torch.get_rng_state()
            loader = iter(self.loader)
            torch.set_rng_state(random_state)  # a resumed run starts its loader elsewhere and must draw the same
            for number, batch in enumerate(loader, start=first):
                yield batch, self.sampler.share(number)
            self.sampler.set_epoch(self.sampler.epoch + 1)

    def wrapped(self) -> nn.Module:
        """Return the network as DDP wraps it, or itself in a run of one process."""
        parallel = ParallelConfig(
            find_unused_parameters=self.options["find_unused_parameters"],
            static_graph=self.options["use_static_graph"],
            gradient_as_bucket_view=False,  # gradients outlive the wrapper that is replaced when parts are unfrozen
            broadcast_buffers=False,  # they are constants
        )
        return wrap(self.network, parallel, self.world, self.world.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        if self.train_options["precision"] == "bf16":
            return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def step(self, network: nn.Module, batch: Mapping[str, Any], share: Share) -> None:
        """Do one optimizer step; the loss is weighted by how many samples of the global batch this rank holds."""
        device, train = self.world.device, self.train_options
        low, sharp = batch["L"].to(device, non_blocking=True), batch["H"].to(device, non_blocking=True)
        with self.autocast():
            restored = network(low)
        loss = self.loss(restored, sharp)
        self.optimizer.zero_grad(set_to_none=True)
        (loss * (share.num_local * self.world.size / share.num_global)).backward()
        if train["G_optimizer_clipgrad"]:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), train["G_optimizer_clipgrad"])
        self.optimizer.step()
        if self.average is not None:
            update_average(self.average, self.network, train["E_decay"])
        self.window[0] += loss.detach().double() * share.num_local
        self.window[1] += share.num_local

    def window_sums(self) -> Tensor:
        """Return loss sum and count since the last line of the log, over all ranks. Collective."""
        return reduce_sum(self.window)

    def evaluate(self, *, final: bool = False) -> Validation | None:
        """Validate the moving average, or else the network, and write what was found. Collective."""
        if self.test_data is None:
            return None
        images = Path(self.options["path"]["images"]) / str(self.iteration)
        network: VRT = self.average if self.average is not None else self.network
        save = images if self.options["val"]["save_img"] else None
        found = validate(network, self.test_data, self.options, self.world, save)
        if found.clips:
            self.history.append({"iteration": self.iteration, "validation": found.summary()})
            logger.info("iteration %d: validation\n%s", self.iteration, found.table())
        if final and self.world.is_main and found.example is not None and self.options["val"]["side_by_side"]:
            path = images.parent / f"side_by_side_{self.iteration}.png"
            write_side_by_side(path, found.example, found.baseline)
            logger.info("side by side: %s", path)
        return found


def run_task(options: dict[str, Any], world: World) -> dict[str, Any]:
    """Train (or, without training data, test) as the options say.

    Returns:
        ``iterations``, ``world_size``, ``folder``, the last ``loss`` and the metrics of the last validation.

    Raises:
        UserError: The options, data or weights are wrong.
        Preempted: A signal asked the run to stop; its checkpoint is safe.
    """
    together(lambda: resolve_demo(options) if world.is_local_main else None)
    run = together(lambda: Run(resolve_demo(options), world))
    describe(options, world, run.network)
    with Persistence(run) as persistence:
        persistence.start()
        loss = train(run, persistence) if run.sampler is not None else None
        validation = run.evaluate(final=True)
    if world.is_main and validation is not None and validation.clips:
        print(validation.table(), flush=True)
    summary = validation.summary() if validation is not None else {}
    result = {"iterations": run.iteration, "world_size": world.size, "folder": str(run.folder), "loss": loss}
    return result | summary


def train(run: Run, persistence: Persistence) -> float | None:
    """Train from ``run.iteration`` to ``total_iter``; return the mean loss of the last logged window."""
    options, total = run.train_options, run.train_options["total_iter"]
    seed_rank(options["manual_seed"], run.world.rank, run.iteration)
    persistence.restore_random_state()
    run.network.train()
    loss, started = None, time.perf_counter()
    network: nn.Module | None = None
    batches = run.batches()
    with PreemptionWatch() as watch:
        while run.iteration < total:
            iteration = run.iteration + 1
            if freeze(run.network, options, iteration) or network is None:
                network = None
                gc.collect()  # the old reducer's hooks must be gone before the new one's are set
                network = run.wrapped()
            set_learning_rate(run.optimizer, iteration, options)
            batch, share = next(batches)
            run.step(network, batch, share)
            assert run.sampler is not None
            run.sampler.commit()
            run.iteration = iteration
            if _due(iteration, options["checkpoint_print"]) or iteration == total:
                loss = _log(run, time.perf_counter() - started)
                started = time.perf_counter()
            if _due(iteration, options["checkpoint_test"]) and iteration < total:
                found = run.evaluate()
                persistence.metric = found.summary().get("psnr") if found is not None else None
            stop = watch.agreed()
            if stop or _due(iteration, options["checkpoint_save"]) or iteration == total:
                persistence.save()
            if stop:
                persistence.wait()
                raise Preempted(f"{stop}: stopped after iteration {iteration}; the same command goes on from there")
    return loss


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0


def _log(run: Run, seconds: float) -> float:
    total, count = run.window_sums().tolist()
    run.window.zero_()
    loss = total / count
    rate, epoch = run.optimizer.param_groups[0]["lr"], run.sampler.epoch if run.sampler else 0
    if loss != loss:
        raise EveryrankError(
            f"the loss is nan at iteration {run.iteration}: lower train.G_optimizer_lr (it is {rate:g} now), or set "
            "train.G_optimizer_clipgrad; earlier checkpoints are whole"
        )
    run.history.append({"iteration": run.iteration, "epoch": epoch, "loss": loss, "lr": rate})
    logger.info("iteration %d, epoch %d: loss %.6f, lr %.3e, %.1f s", run.iteration, epoch, loss, rate, seconds)
    return loss
