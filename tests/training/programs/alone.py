"""Programs in which rank 0 does something that the other ranks do not, or not yet."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch

import everyrank
from everyrank import TrainerDDP, cleanup_ddp, initialize_ddp
from everyrank.runtime import handover


def targets(output: Any, data: Any) -> tuple[Any]:
    """Return what is summed."""
    return (data[1],)


def make_trainer(folder: Path, **changes: Any) -> tuple[TrainerDDP, Any]:
    """Return a trainer whose training is done, and its test loader."""
    testing = changes.pop("testing", {})
    config = tiny.make_config(folder, num_epochs=1, ema={"decay": 0.5}, **changes)
    metrics = {"mse": {"type": "MeanSquaredError"}, "sum": {"type": "SumMetric", "select": targets}}
    config["testing"] = {"batch_size": 7, "metrics": metrics, **testing}
    trainer = TrainerDDP(config=config)
    loaders = trainer.prepare_dataloaders(
        train_dataset=tiny.make_data(40), val_dataset=tiny.make_data(9), test_dataset=tiny.make_data(53, seed=1)
    )
    trainer.run_training(loaders[0], loaders[1])
    return trainer, loaders[2]


def as_the_documents_say(folder: Path) -> dict[str, Any] | None:
    """Test on rank 0 alone while the others clean up and leave."""
    launched = everyrank.detect()
    initialize_ddp(launched.rank, launched.world_size, timeout_s=10)
    trainer, test_loader = make_trainer(folder)
    result = trainer.run_test(test_loader) if trainer.world.is_main else None
    cleanup_ddp()
    return result.as_dict() if result is not None else None


def on_all_ranks(folder: Path, where: str) -> list[dict[str, Any]]:
    """Test on all ranks, three times: again, and after rank 0 has tested something else alone."""
    with everyrank.join(device="cpu", timeout_s=30) as world:
        trainer, test_loader = make_trainer(folder, testing={"on": where})
        results = [trainer.run_test(test_loader).as_dict() for _ in range(2)]
        if world.is_main and where == "rank0":
            _, _, other = trainer.prepare_dataloaders(
                train_dataset=tiny.make_data(40), test_dataset=tiny.make_data(11, seed=3)
            )
            trainer.run_test(other)
        return [*results, trainer.run_test(test_loader).as_dict()]


def called_on(folder: Path, methods: tuple[str, ...], rank: int) -> list[str]:
    """Call what needs other ranks on one rank, while the others leave; return what was said."""
    with everyrank.join(device="cpu", timeout_s=60) as world:
        trainer, test_loader = make_trainer(folder)
        calls = {
            "save_checkpoint": lambda: trainer.save_checkpoint(),
            "validate": lambda: trainer.validator.validate(trainer.module, test_loader),
            "run_test": lambda: trainer.run_test(test_loader),
        }
        return [said_by(calls[method]) for method in methods if world.rank == rank]


class _SlowLook:
    """A store whose answer that there is no result reaches this rank when rank 0 has left."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def check(self, keys: list[str]) -> bool:
        found = self._store.check(keys)
        if not found and keys[0].endswith("/result"):
            self._store.wait(["left/0"])
        return bool(found)


def fails_and_leaves(folder: Path, between_looks: bool = False) -> list[str]:
    """Test where rank 0's evaluation fails, leave, and save a checkpoint when the group is gone.

    Args:
        between_looks: Whether rank 0 fails and leaves just after another rank has looked for its result.
    """

    def bad_loss(output: Any, data: Any) -> Any:
        raise ZeroDivisionError("no loss")

    with everyrank.join(device="cpu", timeout_s=60) as world:
        trainer, test_loader = make_trainer(folder)
        if between_looks and not world.is_main:
            find = handover.find_store
            handover.find_store = lambda: _SlowLook(find())
        trainer.tester.criterion = bad_loss
        said = said_by(lambda: trainer.run_test(test_loader))
    return [said, said_by(trainer.save_checkpoint)]


def said_by(call: Callable[[], Any]) -> str:
    """Return the type and text of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def with_folders_of_their_own(folder: Path) -> dict[str, Any]:
    """Go on in a folder of each rank's own, as on nodes that share no file system."""
    launched = everyrank.detect()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports half of torch, from where this process was started
    os.chdir(folder / str(launched.rank))
    with everyrank.join(device="cpu", timeout_s=60):
        trainer = TrainerDDP(config=tiny.make_config("run", num_epochs=2))
        loaded = tiny.weights(trainer)
        trainer.prepare_dataloaders(train_dataset=tiny.make_data(40))
        trainer.run_training()
        return {"loaded": loaded, "trained": tiny.weights(trainer)}
