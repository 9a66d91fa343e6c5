"""TrainerDDP: configured training on one process or many, with the same result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from everyrank.checkpoint.checkpointer import LoadedCheckpoint
from everyrank.data.split import split_dataset
from everyrank.errors import DataError, Preempted
from everyrank.runtime.logs import get_logger
from everyrank.runtime.preemption import PreemptionWatch
from everyrank.runtime.world import World
from everyrank.training import build
from everyrank.training.config import TrainerConfig, read_config
from everyrank.training.decisions import Judge
from everyrank.training.ema import WeightAverage
from everyrank.training.evaluation.evaluators import DefaultValidator, EvaluationResult
from everyrank.training.failures import SignalNoticed, explain
from everyrank.training.loaders import num_samples, prepare_loaders, sampler_of
from everyrank.training.loop import EpochLoop, Position
from everyrank.training.parallel.local_updates import make_local_updates
from everyrank.training.parallel.own_state import pack_own
from everyrank.training.parallel.wrapping import powersgd_of, send_buffers, wrap
from everyrank.training.placement import make_run_folder, notice_differences, resolve_device, resolve_world
from everyrank.training.pruning import has_trial, report_and_prune
from everyrank.training.saving.persistence import Persistence
from everyrank.training.saving.reload import load_model
from everyrank.training.saving.state import pack, unpack
from everyrank.training.seeding import restore_rng, seed_rank
from everyrank.training.step import TrainStep, step_at_epoch_end
from everyrank.training.tracking.history import History, Row
from everyrank.training.tracking.observers import Observers

logger = get_logger("training")


class TrainerDDP:
    """Trains, validates, tests, checkpoints and resumes a model as its configuration says.

    The same program runs in one process and in many: with the global batch held fixed, 1, 2 or 3 ranks take the same
    optimizer steps. Every rank makes a trainer and calls its methods; rank 0 writes.

    Args:
        rank: This process's rank; may be left out where a group is joined or there is one process.
        config: The configuration: a mapping (from YAML with ``get_loader()``) or a ``TrainerConfig``. The keys are in
            the configuration reference.
        world: The joined world; by default the current one.

    Attributes:
        config: The whole configuration, defaults included.
        world: The world this trainer runs in.
        device: This rank's device.
        run: The run's folder.
        module: The bare model; ``model`` is what the step calls (DDP around it where there are several ranks).
        optimizer: The optimizer.
        scheduler: The learning-rate scheduler, or None.
        validator: The validator.
        tester: The tester.
        early_stopping: The early stopping, or None.
        global_batch_size: Samples of a global batch over all ranks; a resumed run keeps the one it started with.

    Raises:
        ConfigError: The configuration has mistakes (all are listed), or does not fit this machine.
        LaunchEnvironmentError: A launcher started several processes but no group is joined.
        CheckpointError: The checkpoint to resume from does not fit.
    """

    def __init__(
        self,
        rank: int | None = None,
        config: Mapping[str, Any] | TrainerConfig | None = None,
        world: World | None = None,
    ) -> None:
        self.config = read_config(config)
        training = self.config.training
        self.world = resolve_world(rank, world, self.config)
        notice_differences(self.config, self.world)
        self.device = resolve_device(training.device, self.world)
        self.early_stopping = build.build_early_stopping(self.config)
        self.validator = build.build_validator(self.config, self.world, self.device)
        self.tester = build.build_tester(self.config, self.world, self.device)
        self.module = build.build_model(self.config, self.world, self.device)
        self.model = wrap(self.module, self.config.parallel, self.world, self.device)
        self.optimizer = build.build_optimizer(self.module, training)
        self.scheduler = build.build_scheduler(self.optimizer, training.scheduler)
        self.ema = WeightAverage(self.module, training.ema) if training.ema else None
        self._local = make_local_updates(self.module, self.config.parallel, self.world, self.ema)
        self.run = make_run_folder(self.config, self.world)  # only now: what is wrong above leaves no file behind
        self.history = History(self.run / "history.jsonl" if self.world.is_main else None)
        by_step = training.scheduler is not None and training.scheduler.interval == "step"
        self._step = TrainStep(
            self.model,
            self.module,
            self.optimizer,
            build.make_criterion(self.config),
            self.config.apply_model,
            training,
            self.device,
            scheduler=self.scheduler if by_step else None,
            ema=self.ema,
            local=self._local,
        )
        self._judge = Judge(self.config, self.world, self.early_stopping)
        self._position = Position()
        self._stopped_early = False
        self._sync_every = 1
        self._train_loader: Any = None
        self._loaders: tuple[Any, Any, Any] | None = None
        self._watch: PreemptionWatch | None = None
        self.global_batch_size = training.global_batch_size or (training.batch_size or 0) * self.world.size
        self._persistence = Persistence(self.run, self.world, training, self.device)
        self._resume_from = self._persistence.loaded
        if self._resume_from is not None:
            self._restore(self._resume_from)
        else:
            self.history.load_state_dict({"num_rows": 0, "epochs": []})

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0; between two epochs, the number of finished ones."""
        return self._position.epoch

    @property
    def step(self) -> int:
        """Number of optimizer steps done."""
        return self._position.step

    def prepare_dataloaders(
        self,
        dataset: Any = None,
        split: Sequence[float] | None = None,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return loaders for training, validation and test.

        Give one ``dataset`` to be split, or the parts, or nothing: then the configuration's ``data`` section is used.

        Args:
            dataset: A map-style dataset, split at random from ``training.seed``, the same on every rank.
            split: Fractions of training, validation and test; default [0.8, 0.1, 0.1].
            train_dataset: The training data.
            val_dataset: The validation data, or None.
            test_dataset: The test data, or None.
            collate_fn: Makes a batch of a list of samples; by default it fits tensors, tuples, dictionaries and graphs.

        Returns:
            Three loaders of this rank's shares; None for a part without data.

        Raises:
            DataError: If no data are given or configured, or the training data are empty.
        """
        data = self.config.data
        if dataset is None and train_dataset is None and data is not None:
            dataset, split = data.type(*data.args, **data.kwargs), split or data.split
        datasets = (train_dataset, val_dataset, test_dataset)
        if dataset is not None:
            if num_samples(dataset) == 0:
                raise DataError(f"The dataset ({type(dataset).__name__}) is empty. Look at how its files are found.")
            parts = split_dataset(dataset, split or [0.8, 0.1, 0.1], seed=self.config.training.seed)
            if len(parts) != 3:
                raise DataError(f"split={list(split or ())} was given; three fractions are needed.")
            datasets = (parts[0], parts[1], parts[2])
        self._loaders = prepare_loaders(self.config, self.world, self.global_batch_size, datasets, collate_fn)
        return self._loaders

    def run_training(
        self, train_loader: Any = None, val_loader: Any = None, trial: Any = None, until_epoch: int | None = None
    ) -> tuple[list[Row], list[Row]]:
        """Train to the last epoch, or until early stopping, from where the run is. Collective.

        Args:
            train_loader: As ``prepare_dataloaders`` gives; by default the one it gave last, or would give.
            val_loader: As well; None beside a ``train_loader`` trains without validation.
            trial: Rank 0's Optuna trial, to report to and to be pruned by; the other ranks pass None.
            until_epoch: Return when this many epochs are done; the next call goes on. By default all.

        Returns:
            The training and the validation history: a row (a dictionary) for each epoch, those before a resume too.

        Raises:
            Preempted: A signal asked to stop; a checkpoint is saved, and the same command goes on from it.
            NonFiniteLossError: A loss is not finite and ``training.nan_policy`` is ``stop``.
            optuna.TrialPruned: On every rank, if the trial was pruned.
        """
        if train_loader is None:
            train_loader, val_loader, _ = self._loaders or self.prepare_dataloaders()
        self._train_loader = train_loader
        self._start_from_here(train_loader)
        is_trial = has_trial(self.world, trial)
        sampler = sampler_of(train_loader, "the training loader")
        observers = Observers.of(self.config, self.run, self.world, sampler, self.step)
        signal_name = None
        with ExitStack() as stack:
            stack.enter_context(observers)
            for loader in (train_loader, val_loader):
                stack.enter_context(getattr(loader, "shield", nullcontext()))
            self._watch = stack.enter_context(PreemptionWatch()) if self.config.training.handle_signals else None
            try:
                for row in self._epochs(train_loader, val_loader, observers, until_epoch):
                    if is_trial:
                        report_and_prune(self.world, trial, row)
            except SignalNoticed as noticed:
                signal_name = str(noticed)
                self._save(None)
            self._meet()
            self._persistence.finish()
        if signal_name is not None:
            raise Preempted(
                f"{signal_name}: stopped at epoch {self.epoch}, step {self.step}; the checkpoint is saved in "
                f"{self._persistence.checkpointer.folder}. Run the same command again to go on."
            )
        return self.history.training(), self.history.validation()

    def run_test(self, test_loader: Any = None) -> EvaluationResult:
        """Evaluate the model on the test set and report. Collective.

        Args:
            test_loader: As ``prepare_dataloaders`` gives; by default the one it gave last, or would give.

        Raises:
            DataError: If there is no test data.
        """
        loader = test_loader if test_loader is not None else (self._loaders or self.prepare_dataloaders())[2]
        if loader is None:
            raise DataError("There is no test data: the split leaves none, or no test_dataset was given.")
        result = self._evaluate(self.tester, loader, None)
        self.tester.report(result)
        self.history.add_other("test", {"step": self.step, **result.as_dict()})
        return result

    def save_checkpoint(self) -> Path:
        """Save a checkpoint of this moment and return its folder when it is on disk. Collective."""
        if self._train_loader is None:
            self._train_loader = (self._loaders or self.prepare_dataloaders())[0]
        self._save(None)
        self._persistence.finish()
        return self._persistence.checkpointer.folder / f"step-{self.step:08d}"

    load_model = staticmethod(load_model)

    def _epochs(
        self, train_loader: Any, val_loader: Any, observers: Observers, until_epoch: int | None
    ) -> Iterator[Row]:
        """Train epoch after epoch; yield the row of each when all is decided and saved."""
        training = self.config.training

        def at_sync(rows: list[tuple[int, float, float | None]]) -> None:
            observers.steps(self._position, rows)
            self._stop_if_signalled()

        loop = EpochLoop(
            step=self._step,
            world=self.world,
            config=training,
            position=self._position,
            history=self.history,
            ledger=self._persistence.ledger,
            at_sync=at_sync,
            save=lambda: self._save(None),
        )
        loop.sync_every = self._sync_every  # what an earlier call has found
        self.model.train()
        num_epochs = min(training.num_epochs, until_epoch if until_epoch is not None else training.num_epochs)
        while self._position.epoch < num_epochs and not self._stopped_early:
            started = time.monotonic()
            loop.run(train_loader)
            self._sync_every = loop.sync_every
            result = self._validate(val_loader, loop.sync_every)
            row = self._end_epoch(result, time.monotonic() - started)
            observers.epoch(row)
            yield row

    def _validate(self, val_loader: Any, look_up_every: int) -> EvaluationResult | None:
        """Validate if it is due; signals are looked up every ``look_up_every`` batches."""
        epoch, validation = self._position.epoch, self.config.validation
        if val_loader is None or ((epoch + 1) % validation.every and epoch + 1 != self.config.training.num_epochs):
            return None

        def look_up() -> None:
            if (self.validator.batch + 1) % look_up_every == 0:
                self._stop_if_signalled()

        result = self._evaluate(self.validator, val_loader, look_up if validation.on == "all" else None)
        self._stop_if_signalled()
        self.validator.report(result)
        return result

    def _end_epoch(self, result: EvaluationResult | None, seconds: float) -> Row:
        """Record the epoch, decide, step the scheduler, move on and save what is due."""
        training, position = self.config.training, self._position
        values = {"train_loss": position.mean_loss}
        if result is not None:
            values.update({f"val_{name}": value for name, value in result.as_dict().items()})
        row: Row = {"epoch": position.epoch, "step": position.step, **values}
        row.update(lr=float(self.optimizer.param_groups[0]["lr"]), seconds=seconds)
        if self.world.is_main:
            done = f"{position.epoch + 1}/{training.num_epochs}"
            logger.info("Epoch %s: train_loss=%.4g, %.1f s", done, position.mean_loss, seconds)
        verdict = self._judge.decide(position.epoch, values, validated=result is not None)
        step_at_epoch_end(self.scheduler, self.config, values)
        self.history.add_epoch(row)
        position.epoch += 1
        position.loss_sum, position.num_samples = 0.0, 0
        sampler_of(self._train_loader, "the training loader").set_epoch(position.epoch)
        self._stopped_early = verdict.stop
        is_due = training.checkpoint_at is not None and position.epoch % training.checkpoint_at == 0
        if is_due or verdict.improved or verdict.stop or position.epoch == training.num_epochs:
            self._save(values.get(training.best_metric))
        return row

    def _evaluate(
        self, evaluator: DefaultValidator, loader: Any, between_batches: Callable[[], None] | None
    ) -> EvaluationResult:
        if self._local is None:
            send_buffers(self.module, self.world)
        self._meet()
        averaged: AbstractContextManager[None] = nullcontext()
        if self.ema is not None and self.ema.config.evaluate:
            averaged = self.ema.in_place_of_weights()
        try:
            with averaged:
                return evaluator.evaluate(self.module, loader, between_batches)
        except SignalNoticed:
            raise
        except Exception as error:
            told = explain(error, self.world, f"epoch {self.epoch}, {evaluator.where(loader)}")
            if told is error:
                raise
            raise told from error

    def _meet(self) -> None:
        """With local updates, make one model of the ranks' before anything else than training is done with it."""
        if self._local is not None:
            self._local.meet()

    def _stop_if_signalled(self) -> None:
        if self._local is not None and self._local.num_apart:
            return  # a checkpoint here would be a meeting that the uninterrupted run does not have
        if self._watch is not None and (signal_name := self._watch.agreed()) is not None:
            raise SignalNoticed(signal_name)

    def _start_from_here(self, train_loader: Any) -> None:
        """Set the cursor and this rank's randomness to where the run is."""
        sampler = sampler_of(train_loader, "the training loader")
        saved, self._resume_from = self._resume_from, None
        if saved is None:
            sampler.set_epoch(self._position.epoch)
            if self.step == 0:  # a later call goes on with the randomness as it is
                seed_rank(self.config.training.seed, self.world.rank)
            return
        sampler.load_state_dict(saved.state["sampler"])
        self._persistence.say_what_changed(sampler.global_batch_size)
        if saved.world_size == self.world.size:
            restore_rng(saved.rank_states[self.world.rank]["rng"], self.device)
        else:
            seed_rank(self.config.training.seed, self.world.rank, self.step)

    def _parts(self) -> dict[str, Any]:
        """Return what a checkpoint is made of, besides numbers."""
        return {
            "module": self.module,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self._step.scaler,
            "ema": self.ema,
            "powersgd": powersgd_of(self.model),
            "local": self._local,
        }

    def _save(self, metric: float | None) -> None:
        self._meet()
        self.history.flush()
        stopping = self.early_stopping
        tensors, state = pack(
            **self._parts(),
            position=self._position,
            extra={
                "sampler": sampler_of(self._train_loader, "the training loader").state_dict(),
                "history": self.history.state_dict(),
                "best": self._judge.best,
                "stopped_early": self._stopped_early,
                "early_stopping": stopping.state_dict() if stopping is not None else None,
            },
        )
        own = pack_own(self.world.rank, **self._parts())
        self._persistence.save(self.step, tensors, state, metric, own)

    def _restore(self, saved: LoadedCheckpoint) -> None:
        """Go back to the checkpoint, all but the cursor and the randomness, which wait for the start of training."""
        self._position = unpack(saved, world=self.world, **self._parts())
        self._judge.best, self._stopped_early = saved.state["best"], saved.state["stopped_early"]
        self.global_batch_size = int(saved.state["sampler"]["global_batch_size"])
        self.history.load_state_dict(saved.state["history"])
        if self.early_stopping is not None and saved.state["early_stopping"] is not None:
            self.early_stopping.load_state_dict(saved.state["early_stopping"])
        if self.world.is_main:
            logger.info("Resuming from %s: epoch %d, step %d", saved.path, self.epoch, self.step)
