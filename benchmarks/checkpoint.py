"""How long training stands still for a checkpoint, beside torch.save and Lightning's checkpoints.

    python benchmarks/checkpoint.py --sizes 50 500

A state of the given size in MB (a model and two moments for each weight, as Adam keeps) is saved by each contender in
turn, interleaved so that a slow moment of the machine meets all of them. Between two saves the "training" goes on
for as long as the writing in the background takes; that time is not counted, nor what the writing takes of the
processor meanwhile. Medians and ratios to torch.save are printed.

Lightning is measured as its Trainer saves: dump_checkpoint, then its default strategy's save_checkpoint. If it is not
installed it is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import everyrank
from everyrank.checkpoint.encoding import flatten_state

GOAL = 0.15
LAYER_BYTES = 4 * 1024 * 1024


def build(megabytes: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model and an Adam optimizer that hold about ``megabytes`` MB of tensors together."""
    num_layers = max(1, round(megabytes * 1e6 / LAYER_BYTES / 3))
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(num_layers)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


Saver = Callable[[int], None]


def with_torch(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> tuple[Saver, Saver]:
    """The usual way: torch.save of the state dicts."""

    def save(step: int) -> None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, folder / "x.pt")

    return save, lambda step: None


def with_everyrank(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> tuple[Saver, Saver]:
    """everyrank's Checkpointer: a copy, and the writing in the background."""
    checkpointer = everyrank.Checkpointer(folder, world=everyrank.current_world(), keep_last=1, keep_best=0)

    def save(step: int) -> None:
        tensors, rest = flatten_state(optimizer.state_dict())
        groups = {"model": model.state_dict(), "optimizer": tensors}
        checkpointer.save(step, tensors=groups, state={"optimizer": rest}, rank_state={})

    return save, lambda step: checkpointer.wait()


def with_lightning(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> tuple[Saver, Saver]:
    """Lightning's Trainer.save_checkpoint."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.model(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1024)))
    trainer.fit(Module(), loader)
    return (lambda step: trainer.save_checkpoint(folder / "x.ckpt")), (lambda step: None)


CONTENDERS = {"torch.save": with_torch, "everyrank": with_everyrank, "Lightning": with_lightning}


def measure(megabytes: int, repeats: int, folder: Path) -> dict[str, list[float]]:
    """Return for each contender the seconds that each of its saves took, the first one last."""
    model, optimizer = build(megabytes)
    savers = {}
    for name, make in CONTENDERS.items():
        place = folder / name
        place.mkdir()
        try:
            savers[name] = make(model, optimizer, place)
        except ImportError:
            print(f"{name} is not installed and left out")
    seconds: dict[str, list[float]] = {name: [] for name in savers}
    for step in range(1, repeats + 2):
        for name, (save, finish) in savers.items():
            start = time.perf_counter()
            save(step)
            seconds[name].append(time.perf_counter() - start)
            finish(step)
    return {name: [*times[1:], times[0]] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500], help="MB of state")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default, removed afterwards")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    table: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'state':>7}  {'saved by':<12} {'stand-still':>12} {'first time':>12} {'of torch.save':>14}")
    reached = True
    for megabytes in args.sizes:
        folder = Path(tempfile.mkdtemp(prefix="everyrank-benchmark-", dir=args.folder))
        try:
            seconds = measure(megabytes, args.repeats, folder)
        finally:
            shutil.rmtree(folder)
        medians = {name: statistics.median(times[:-1]) for name, times in seconds.items()}
        for name, median in medians.items():
            ratio = median / medians["torch.save"]
            first = seconds[name][-1]
            table.setdefault(str(megabytes), {})[name] = {"median_s": median, "first_s": first}
            print(f"{megabytes:>4} MB  {name:<12} {median * 1e3:>9.1f} ms {first * 1e3:>9.1f} ms {ratio:>14.3f}")
        reached = reached and medians["everyrank"] <= GOAL * medians["torch.save"]
    print(f"goal of at most {GOAL} of torch.save: {'reached' if reached else 'missed'}")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
