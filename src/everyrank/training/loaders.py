"""The trainer's loaders: splits and global batches of the data room, with the sections of the configuration."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from everyrank.data.loader import make_loader
from everyrank.data.randomness import sample_seed
from everyrank.data.sampler import GlobalBatchSampler
from everyrank.data.split import split_dataset
from everyrank.errors import DataError
from everyrank.runtime.logs import get_logger
from everyrank.runtime.world import World
from everyrank.training.config import TrainerConfig
from everyrank.training.config_data import LoaderConfig

logger = get_logger("training")


def build_loader(
    dataset: Any,
    options: LoaderConfig,
    *,
    global_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    shuffle: bool,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool | None = None,
    device: torch.device,
) -> Any:
    """Return a loader of this rank's shares of global batches.

    Args:
        dataset: A map-style dataset, not empty.
        options: Workers, memory, and whether a short last batch is left out.
        global_batch_size: Samples of a global batch over all ranks.
        rank: This process's rank.
        world_size: Number of processes that share the batches.
        seed: Seed of the order.
        shuffle: Whether each epoch has a new order.
        collate_fn: Makes a batch of a list of samples.
        drop_last: Whether a short last batch is left out; None: as the options say.
        device: Where the batches go.
    """
    sampler = GlobalBatchSampler(
        num_samples(dataset),
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=options.drop_last if drop_last is None else drop_last,
    )
    loader = make_loader(
        dataset,
        sampler,
        num_workers=options.num_workers,
        pin_memory=device.type == "cuda" and options.pin_memory is not False,
        prefetch_factor=options.prefetch_factor,
        collate_fn=collate_fn,
    )
    if hasattr(loader, "generator"):
        # Starting loader processes draws a number. From the global generator it would shift the model's randomness, and
        # a run resumed in the middle of an epoch would differ from the uninterrupted one.
        # The workers' own generators, which a collate_fn may use, differ on each rank.
        loader.generator = torch.Generator().manual_seed(sample_seed(seed, 0, rank) % 2**63)
        loader.worker_init_fn = loader.shield = SignalShield()  # type: ignore[union-attr]
    return loader


class SignalShield:
    """Keeps loader processes alive through a signal to the process group while it is raised.

    A rank that has got a signal still needs batches until all ranks have agreed where to stop. As a context manager it
    is raised for its block; lowered, it leaves signals their usual effect, so that a rank can end its loader processes.
    """

    def __init__(self) -> None:
        self._raised = torch.zeros((), dtype=torch.uint8).share_memory_()

    def __enter__(self) -> SignalShield:
        self._raised.fill_(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._raised.fill_(0)

    def __call__(self, worker: int) -> None:
        """Install the handlers; a loader process calls it when it starts."""
        signal.set_wakeup_fd(-1)  # the rank's, if it watches for signals: a loader's are not the rank's
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if not self._raised.item():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def at_work(*loaders: Any) -> Iterator[None]:
    """Keep the loaders' processes alive through signals for the block, and let them end by themselves after it."""
    with ExitStack() as stack:
        for loader in loaders:
            stack.enter_context(getattr(loader, "shield", nullcontext()))
            stack.callback(getattr(loader, "end_workers", nullcontext))
        yield


def num_samples(dataset: Any) -> int:
    """Return the length of a dataset.

    Raises:
        DataError: If it has none.
    """
    try:
        return len(dataset)
    except TypeError:
        raise DataError(
            f"The dataset is a {type(dataset).__name__} without a length. Give a map-style dataset (with __len__ and "
            "__getitem__): splits and an exact resume need to know which samples there are."
        ) from None


def sampler_of(loader: Any, name: str) -> GlobalBatchSampler:
    """Return the global batch sampler of a loader.

    Raises:
        DataError: If it has none: then nothing knows which samples this rank holds of a global batch.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, GlobalBatchSampler):
        raise DataError(
            f"{name} is a {type(loader).__name__} without a GlobalBatchSampler, so its share of each global batch is "
            "unknown. Make the loaders with prepare_dataloaders(train_dataset=..., val_dataset=..., test_dataset=...), "
            "or give the DataLoader batch_sampler=everyrank.GlobalBatchSampler(...)."
        )
    return sampler


def three_parts(
    config: TrainerConfig, dataset: Any, split: Sequence[float] | None, parts: tuple[Any, Any, Any]
) -> tuple[Any, Any, Any]:
    """Return the data of training, validation and test: those given, or a dataset (the configured one) split.

    Raises:
        DataError: If the dataset is empty, or the fractions are not three.
    """
    data = config.data
    if dataset is None and parts[0] is None and data is not None:
        dataset, split = data.type(*data.args, **data.kwargs), split or data.split
    if dataset is None:
        return parts
    if num_samples(dataset) == 0:
        raise DataError(f"The dataset ({type(dataset).__name__}) is empty. Look at how its files are found.")
    found = split_dataset(dataset, split or [0.8, 0.1, 0.1], seed=config.training.seed)
    if len(found) != 3:
        raise DataError(f"split={list(split or ())} was given; three fractions are needed.")
    return found[0], found[1], found[2]


def prepare_loaders(
    config: TrainerConfig,
    world: World,
    global_batch_size: int,
    datasets: tuple[Any, Any, Any],
    collate_fn: Callable[[list[Any]], Any] | None,
    devices: tuple[torch.device, torch.device, torch.device],
) -> tuple[Any, Any, Any]:
    """Return loaders of training, validation and test data; None for a part without data.

    Args:
        config: The whole configuration.
        world: The joined world.
        global_batch_size: Samples of a global training batch over all ranks.
        datasets: The three datasets; the second and third may be None or empty.
        collate_fn: Makes a batch of a list of samples; None for the usual one.
        devices: Where the batches of each go.

    Raises:
        DataError: If the training data are empty, or there are no data at all.
    """
    if all(dataset is None for dataset in datasets) or (datasets[0] is not None and num_samples(datasets[0]) == 0):
        raise DataError(
            "There is no training data. Either pass it, prepare_dataloaders(dataset=...) or "
            "prepare_dataloaders(train_dataset=..., val_dataset=..., test_dataset=...), or configure it: "
            "data: {type: !pyobject any.module.Dataset, args: [], kwargs: {}, split: [0.8, 0.1, 0.1]}."
        )
    training = config.training
    # Where rank 0 evaluates alone, it takes whole global batches.
    plans: list[tuple[str, LoaderConfig, int, int]] = [("Training", training, global_batch_size, world.world_size)]
    for name, section, on in (
        ("Validation", config.validation, config.validation.on),
        ("Test", config.testing, config.test_on),
    ):
        evaluators = 1 if on == "rank0" else world.world_size
        per_rank = section.batch_size or training.batch_size
        plans.append((name, section, per_rank * evaluators if per_rank else global_batch_size, evaluators))
    loaders: list[Any] = []
    for dataset, device, (name, options, size, ranks) in zip(datasets, devices, plans, strict=True):
        if dataset is None or num_samples(dataset) == 0:
            loaders.append(None)
            continue
        if world.is_main:
            logger.info("%s set size: %s", name, f"{num_samples(dataset):,}")
        loader = build_loader(
            dataset,
            options,
            global_batch_size=size,
            rank=world.rank if ranks > 1 else 0,
            world_size=ranks,
            seed=training.seed,
            shuffle=options is training and training.shuffle,
            collate_fn=collate_fn,
            device=device,
        )
        loaders.append(loader)
    return loaders[0], loaders[1], loaders[2]
