"""Time per training step of TrainerDDP beside a hand-written DDP loop and other trainers.

::

    python benchmarks/step.py                        # a tiny MLP at world sizes 1 and 2, and a step of 50 ms
    python benchmarks/step.py --world-sizes 2 --models tiny --rounds 7
    python benchmarks/step.py --watch                # what it costs to be watched: processor time and memory of a rank

Every contender trains the same model on the same data with the same optimizer and batch size; each rank has one thread
and the backend is gloo. All contenders run in the same processes, in turn, a few hundred steps at a time, in another
order each round; the table has the median over rounds of the time per step, and its ratio to the hand-written loop.
A contender that is not installed is left out with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import everyrank

BATCH = 32


class Model:
    """A model of the benchmark: its layers, and how many steps one turn takes."""

    def __init__(self, width: int, depth: int, num_inputs: int, num_outputs: int, steps: int) -> None:
        self.width, self.depth, self.num_inputs, self.num_outputs = width, depth, num_inputs, num_outputs
        self.steps = steps

    def build(self) -> nn.Module:
        """Return the network."""
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(self.num_inputs, self.width), nn.ReLU()]
        for _ in range(self.depth - 1):
            layers += [nn.Linear(self.width, self.width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.width, self.num_outputs))

    def data(self, world_size: int) -> TensorDataset:
        """Return data for one turn: an epoch of ``steps`` batches per rank."""
        generator = torch.Generator().manual_seed(1)
        count = BATCH * self.steps * world_size
        x = torch.randn(count, self.num_inputs, generator=generator)
        return TensorDataset(x, torch.randint(self.num_outputs, (count,), generator=generator))


MODELS = {
    "tiny": Model(width=64, depth=1, num_inputs=64, num_outputs=10, steps=300),  # MLP 64-64-10
    "50ms": Model(width=2048, depth=3, num_inputs=1024, num_outputs=10, steps=8),
}


def loss_of(output: torch.Tensor, data: Any) -> torch.Tensor:
    """Return the mean cross entropy; the criterion of all contenders."""
    return nn.functional.cross_entropy(output, data[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of all contenders."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


Turn = Callable[[], float]
"""Runs one epoch and returns seconds per step."""


def timed(steps: int, epoch: Callable[[], object]) -> float:
    """Return the seconds per step of an epoch, all ranks starting together."""
    gc.collect()
    everyrank.barrier()
    started = time.perf_counter()
    epoch()
    return (time.perf_counter() - started) / steps


def by_hand(model: Model, world: everyrank.World) -> Turn:
    """The loop that everybody writes: DDP, DataLoader, DistributedSampler."""
    data = model.data(world.world_size)
    sampler = DistributedSampler(data, num_replicas=world.world_size, rank=world.rank)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    network = nn.parallel.DistributedDataParallel(model.build())
    optimizer = optimizer_of(network)
    epochs = iter(range(10**6))

    def epoch() -> None:
        sampler.set_epoch(next(epochs))
        for batch in loader:
            optimizer.zero_grad()
            loss_of(network(batch[0]), batch).backward()
            optimizer.step()

    return lambda: timed(model.steps, epoch)


def with_everyrank(model: Model, world: everyrank.World) -> Turn:
    """TrainerDDP, with its history, its checks for NaN and its watch for signals as they are by default."""
    folder = everyrank.broadcast_decision(tempfile.mkdtemp(prefix="benchmark-step-") if world.is_main else "")
    config = {
        "criterion": loss_of,
        "model": {"type": model.build},
        "parallel": {},
        "training": {
            "path": folder,
            "num_epochs": 10**6,
            "batch_size": BATCH,
            "device": "cpu",
            "optimizer_type": torch.optim.SGD,
            "optimizer_kwargs": {"lr": 0.01, "momentum": 0.9},
            "keep_best": 0,
            "plots": False,
        },
    }
    trainer = everyrank.TrainerDDP(config=config, world=world)
    loader, _, _ = trainer.prepare_dataloaders(train_dataset=model.data(world.world_size))

    def turn() -> float:
        gc.collect()
        everyrank.barrier()
        history, _ = trainer.run_training(loader, until_epoch=trainer.epoch + 1)
        return history[-1]["seconds"] / model.steps  # of the epoch; not of saving and the like

    return turn


def with_accelerate(model: Model, world: everyrank.World) -> Turn:
    """Accelerate's loop."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = model.build()
    optimizer = optimizer_of(network)
    loader = DataLoader(model.data(world.world_size), batch_size=BATCH, shuffle=True)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)

    def epoch() -> None:
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_of(network(batch[0]), batch))
            optimizer.step()

    return lambda: timed(model.steps, epoch)


def with_fabric(model: Model, world: everyrank.World) -> Turn:
    """Lightning Fabric's loop."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=world.world_size, strategy="ddp")
    fabric.launch()
    network = model.build()
    network, optimizer = fabric.setup(network, optimizer_of(network))
    loader = fabric.setup_dataloaders(DataLoader(model.data(world.world_size), batch_size=BATCH, shuffle=True))
    epochs = iter(range(10**6))

    def epoch() -> None:
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(next(epochs))
        for batch in loader:
            optimizer.zero_grad()
            fabric.backward(loss_of(network(batch[0]), batch))
            optimizer.step()

    return lambda: timed(model.steps, epoch)


def with_lightning(model: Model, world: everyrank.World) -> Turn:
    """Lightning's Trainer, with everything optional switched off; a turn's second epoch is timed."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.build()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return loss_of(self.network(batch[0]), batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    class Clock(lightning.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    loader = DataLoader(model.data(world.world_size), batch_size=BATCH, shuffle=True)

    def turn() -> float:
        clock = Clock()
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=world.world_size, strategy="ddp", max_epochs=2, callbacks=[clock], **quiet
        )
        gc.collect()
        trainer.fit(Module(), loader)
        return clock.seconds / model.steps

    return turn


def with_ignite(model: Model, world: everyrank.World) -> Turn:
    """Ignite's engine around DDP."""
    from ignite.engine import create_supervised_trainer

    data = model.data(world.world_size)
    sampler = DistributedSampler(data, num_replicas=world.world_size, rank=world.rank)
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    network = nn.parallel.DistributedDataParallel(model.build())
    engine = create_supervised_trainer(network, optimizer_of(network), nn.functional.cross_entropy)
    epochs = iter(range(10**6))

    def epoch() -> None:
        sampler.set_epoch(next(epochs))
        engine.run(loader, max_epochs=1)

    return lambda: timed(model.steps, epoch)


CONTENDERS: dict[str, Callable[[Model, everyrank.World], Turn]] = {
    "hand-written DDP": by_hand,
    "everyrank": with_everyrank,
    "Accelerate": with_accelerate,
    "Lightning Fabric": with_fabric,
    "Lightning Trainer": with_lightning,
    "Ignite": with_ignite,
}


def measure(name: str, rounds: int, contenders: list[str]) -> dict[str, Any]:
    """Run on every rank: let the contenders take turns, and return the seconds per step of each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for quiet in ("everyrank", "lightning", "lightning.pytorch", "lightning.fabric", "ignite", "accelerate"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    logging.getLogger("everyrank").addHandler(logging.NullHandler())
    turns: dict[str, Turn] = {}
    skipped: dict[str, str] = {}
    with everyrank.join(device="cpu") as world:
        for contender in contenders:
            try:
                turns[contender] = CONTENDERS[contender](MODELS[name], world)
                turns[contender]()  # warms up
            except ImportError as error:
                skipped[contender] = f"not installed ({error})"
        seconds: dict[str, list[float]] = {contender: [] for contender in turns}
        order = random.Random(0)
        for _ in range(rounds):
            names = list(turns)
            order.shuffle(names)
            for contender in names:
                seconds[contender].append(turns[contender]())
    return {"seconds": seconds, "skipped": skipped}


def cost_of_a_turn(steps: int) -> dict[str, float]:
    """Run on every rank: train the tiny model; return processor seconds per step and the memory that is its own."""
    import psutil

    torch.set_num_threads(1)
    logging.getLogger("everyrank").addHandler(logging.NullHandler())
    model = Model(width=64, depth=1, num_inputs=64, num_outputs=10, steps=steps)
    with everyrank.join(device="cpu") as world:
        turn = with_everyrank(model, world)
        turn()
        began_s, waited_s = time.process_time(), time.perf_counter()
        turn()
        spent_s, took_s = time.process_time() - began_s, time.perf_counter() - waited_s
        memory = psutil.Process().memory_full_info().uss
    return {"processor_s": spent_s / steps, "wall_s": took_s / steps, "bytes": memory}


def watched(rounds: int, steps: int) -> dict[str, float]:
    """Measure ranks that are watched and ranks that are not, in turn; print and return what watching costs."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(2 * rounds):
        is_on = number % 4 in (0, 3)  # on, off, off, on: what drifts hits both alike
        with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as scratch:
            off = {} if is_on else {"TORCH_FR_BUFFER_SIZE": "0"}
            ranks = everyrank.launch(cost_of_a_turn, steps, env={"TMPDIR": scratch, **off}, watch=is_on)
        found[is_on] += ranks
    medians = {
        is_on: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for is_on, rows in found.items()
    }
    on, off = medians[True], medians[False]
    cost = {
        "processor_share": on["processor_s"] / off["processor_s"] - 1,
        "wall_share": on["wall_s"] / off["wall_s"] - 1,
        "megabytes": (on["bytes"] - off["bytes"]) / 1e6,
    }
    print(f"\ntiny, world size 2, {rounds} launches of {steps} steps each way, medians over ranks: being watched costs")
    print(f"  {cost['processor_share']:+.2%} of a step's processor time ({1e6 * off['processor_s']:.0f} us without)")
    print(f"  {cost['wall_share']:+.2%} of a step's time ({1e6 * off['wall_s']:.0f} us without)")
    print(f"  {cost['megabytes']:+.2f} MB of a rank's own memory")
    return cost


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    parser.add_argument("--watch", action="store_true", help="measure what watching costs instead")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.watch:
        cost = watched(arguments.rounds, steps=1500)
        if arguments.json:
            arguments.json.write_text(json.dumps({"torch": torch.__version__, "watched": cost}, indent=1) + "\n")
        return
    results = []
    for name in arguments.models:
        for size in arguments.world_sizes:
            # everyrank.launch prints nothing; what Lightning prints is not wanted either
            with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as scratch:
                ranks = everyrank.launch(
                    measure, name, arguments.rounds, arguments.contenders, nproc_per_node=size, env={"TMPDIR": scratch}
                )
            # a step is done when the slowest rank has done it
            medians = {
                contender: statistics.median(
                    map(max, zip(*(rank["seconds"][contender] for rank in ranks), strict=True))
                )
                for contender in ranks[0]["seconds"]
            }
            base = medians.get("hand-written DDP")
            print(f"\n{name}, world size {size}, batch {BATCH} per rank, median of {arguments.rounds} rounds")
            for contender, median in medians.items():
                ratio = f"{median / base:6.2f}" if base else ""
                print(f"  {contender:<18} {1e6 * median:10.0f} us/step {ratio}")
            for contender, reason in ranks[0]["skipped"].items():
                print(f"  {contender:<18} left out: {reason}")
            results.append({"model": name, "world_size": size, "seconds_per_step": medians})
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
