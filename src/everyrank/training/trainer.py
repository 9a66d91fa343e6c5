"""TrainerDDP: configured training on one process or many, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from everyrank.checkpoint.checkpointer import LoadedCheckpoint
from everyrank.checkpoint.rng import restore_rng
from everyrank.errors import DataError, Preempted
from everyrank.runtime.agreement import agree
from everyrank.runtime.collectives import all_here
from everyrank.runtime.preemption import PreemptionWatch
from everyrank.runtime.world import World
from everyrank.training import build
from everyrank.training.config import TrainerConfig, read_config
from everyrank.training.decisions.judge import Judge
from everyrank.training.decisions.pruning import has_trial, report_and_prune
from everyrank.training.evaluation.evaluators import EvaluationResult
from everyrank.training.failures import SignalNoticed
from everyrank.training.hardware.garbage import collecting_every
from everyrank.training.hardware.kernels import chosen_kernels
from everyrank.training.loaders import at_work, build_loader, prepare_loaders, sampler_of, three_parts
from everyrank.training.loop import Position
from everyrank.training.parallel.own_state import pack_own
from everyrank.training.parallel.shares import SpeedMeter, given_shares, is_measured
from everyrank.training.placement import notice_differences, resolve_world, run_folder, training_device
from everyrank.training.run_loop import RunLoop
from everyrank.training.saving.changes import apply_changes, hyperparameters
from everyrank.training.saving.persistence import Persistence
from everyrank.training.saving.reload import load_model
from everyrank.training.saving.replay import is_one_rank, replay_if_asked
from everyrank.training.saving.state import pack, put_foreign, unpack
from everyrank.training.seeding import seed_rank
from everyrank.training.shared_model import Evaluation
from everyrank.training.step import TrainStep
from everyrank.training.tracking.history import History, Row
from everyrank.training.tracking.observers import Observers


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
        self.device = training_device(self.config, self.world)
        self._shares = None if is_one_rank() else given_shares(self.config.parallel, self.world.world_size)
        self.early_stopping = build.build_early_stopping(self.config)
        self.validator = build.build_validator(self.config, self.world, self.device)
        self.tester = build.build_tester(self.config, self.world, self.device)
        self._parts = parts = build.build_parts(self.config, self.world, self.device)
        self.module, self.model, self.optimizer = parts.module, parts.model, parts.optimizer
        self.scheduler, self.ema = parts.scheduler, parts.ema
        self.run, self.history = run_folder(self.config), History(None)
        self._persistence = Persistence(self.run, self.config, self.world, self.device)
        self._step = TrainStep(parts, build.make_criterion(self.config, self.device), self.config, self.device)
        self._evaluation = Evaluation(parts, self.world)
        self._position = Position()
        self._loop = RunLoop(
            config=self.config,
            world=self.world,
            position=self._position,
            history=self.history,
            step=self._step,
            scheduler=self.scheduler,
            judge=Judge(self.config, self.world, self.early_stopping),
            evaluation=self._evaluation,
            validator=self.validator,
            save=self._save,
        )
        self._train_loader: Any = None
        self._loaders: tuple[Any, Any, Any] | None = None
        self.global_batch_size = training.global_batch_size or (training.batch_size or 0) * self.world.world_size
        self._is_foreign, self._resume_from = False, self._persistence.loaded
        if self._resume_from is not None:
            self._restore(self._resume_from)
        # Only now is anything written: what is wrong above leaves no file behind.
        self.history.write_to(self._persistence.begin(is_over=self._loop.is_over(epoch_is_open=False)))

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
            DataError: If no data are given or configured, or the dataset or the training data are empty.
        """
        datasets = three_parts(self.config, dataset, split, (train_dataset, val_dataset, test_dataset))
        devices = (self.device, self.validator.device, self.tester.device)
        self._loaders = prepare_loaders(self.config, self.world, self.global_batch_size, datasets, collate_fn, devices)
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
            The training and the validation history: a row (a dictionary) for each epoch and for each validation, those
            before a resume too. An epoch that the run ends in the middle of has a row as far as it went.

        Raises:
            Preempted: A signal asked to stop; a checkpoint is saved, and the same command goes on from it.
            NonFiniteLossError: A loss is not finite and ``training.nan_policy`` is ``stop``.
            optuna.TrialPruned: On every rank, if the trial was pruned.
        """
        self._persistence.need_to_write("run_training")
        if train_loader is None:
            train_loader, val_loader, _ = self._loaders or self.prepare_dataloaders()
        if train_loader is None:
            raise DataError("There is no training data. Give prepare_dataloaders a train_dataset, or configure `data`.")
        self._start_from_here(train_loader)
        self._loop.until_step = replay_if_asked(self.config, self._persistence.loaded, self._step, train_loader)
        is_trial = has_trial(self.world, trial)
        if is_trial:
            agree(lambda: self._persistence.mark_trial(getattr(trial, "number", None)), on=0)
        sampler = sampler_of(train_loader, "the training loader")
        signal_name = None
        with ExitStack() as stack:
            observers = stack.enter_context(Observers(self.config, self.run, self.world, sampler, self.step))
            stack.callback(self._persistence.settle)
            stack.enter_context(chosen_kernels(self.config.training, self.device))
            stack.enter_context(collecting_every(self.config.training.gc_every_steps, self.optimizer))
            stack.enter_context(at_work(train_loader, val_loader))
            meter = SpeedMeter.of(self.config, self._parts, sampler, self.device, self.world)
            self._loop.meter = stack.enter_context(meter)
            self._loop.watch = stack.enter_context(PreemptionWatch()) if self.config.training.handle_signals else None
            try:
                self.model.train()
                for row in self._loop.run(train_loader, val_loader, self._persistence.ledger, observers, until_epoch):
                    observers.results(row)
                    if is_trial:
                        report_and_prune(self.world, trial, row, self.config.validation)
            except SignalNoticed as noticed:
                signal_name = str(noticed)
                self._save(None)
            if self._parts.local is not None:
                self._parts.local.synchronize()
            self._persistence.finish()
        if signal_name is not None:
            raise Preempted(
                f"{signal_name}: stopped at epoch {self.epoch}, step {self.step}; the checkpoint is saved in "
                f"{self._persistence.checkpointer.folder}. Run the same command again to go on."
            )
        return self.history.training(), self.history.validation()

    def run_test(self, test_loader: Any = None) -> EvaluationResult:
        """Evaluate the model on the test set and report.

        By default (``testing.on: rank0``) rank 0 evaluates all of it alone, and the other ranks need not be there: a
        rank that calls this too gets rank 0's result. Collective with ``testing.on: all`` only.

        Args:
            test_loader: As ``prepare_dataloaders`` gives; by default the one it gave last, or would give.

        Raises:
            DataError: If there is no test data.
            ProcessGroupError: Another rank than 0 called this, but rank 0 does not.
        """
        loader = test_loader if test_loader is not None else (self._loaders or self.prepare_dataloaders())[2]
        if loader is None:
            raise DataError("There is no test data: the split leaves none, or no test_dataset was given.")
        self.tester.step = self.step
        with at_work(loader), chosen_kernels(self.config.training, self.tester.device):
            result = self._evaluation.evaluate(self.tester, loader, self._position, self.config.test_on == "all")
        self.tester.report(result)
        self.history.add_other("test", {"step": self.step, **result.as_dict()})
        return result

    def predict(
        self, dataset: Any, function: Callable[[Any, Any], Any] = lambda output, data: output, batch_size: int = 64
    ) -> Any:
        """Return what the model says of every sample of a dataset. Collective; every rank gets all of it.

        The ranks share the samples, each of which is asked about once. The model is the one that is validated.

        Args:
            dataset: A map-style dataset, not empty.
            function: ``(output, data)`` of a batch to a tensor, or a mapping of tensors, with a row for each sample.
            batch_size: Samples per rank and batch.

        Returns:
            The function's tensors for the whole dataset, in its order, on the CPU.

        Raises:
            DataError: If the dataset is empty, or the function gives no row for each sample.
        """
        loader = build_loader(
            dataset,
            self.config.testing,
            global_batch_size=batch_size * self.world.world_size,
            rank=self.world.rank,
            world_size=self.world.world_size,
            seed=self.config.training.seed,
            shuffle=False,
            drop_last=False,
            device=self.tester.device,
        )
        with at_work(loader), chosen_kernels(self.config.training, self.tester.device):
            return self._evaluation.predict(self.tester, loader, function, self._position)

    def start_from(
        self,
        step: int,
        model: Mapping[str, Any],
        average: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
    ) -> None:
        """Go on from weights of another program, as if this run had done ``step`` optimizer steps.

        Every rank calls it with the same values, before ``run_training``. Learning rates are the configuration's at
        that step, and randomness starts anew.

        Args:
            step: Optimizer steps done.
            model: The model's state dict.
            average: A state dict of averaged weights; None: the model's, where the run keeps an average.
            optimizer: The optimizer's state dict; None starts its state anew.

        Raises:
            CheckpointError: If they do not fit.
        """
        put_foreign(self._parts, step, model, average, optimizer)
        self._position.step = step
        self._resume_from, self._is_foreign = None, True
        if self._parts.frozen is not None:
            self._parts.frozen.num_steps = step

    def save_checkpoint(self) -> Path:
        """Save a checkpoint of this moment and return its folder when it is on disk. Collective.

        Raises:
            ProcessGroupError: A rank has left, or does not come within the group's timeout; it is named.
        """
        self._persistence.need_to_write("save_checkpoint")
        all_here("save_checkpoint", self.world)
        if self._train_loader is None:
            self._train_loader = (self._loaders or self.prepare_dataloaders())[0]
        if self._resume_from is not None or self._is_foreign:
            self._start_from_here(self._train_loader)
        self._save(None)
        self._persistence.finish()
        return self._persistence.checkpointer.folder / f"step-{self.step:08d}"

    load_model = staticmethod(load_model)

    def _start_from_here(self, train_loader: Any) -> None:
        """Set the cursor and this rank's randomness to where the run is."""
        sampler = sampler_of(train_loader, "the training loader")
        before = sampler_of(self._train_loader or train_loader, "the training loader")
        if before is not sampler and before.position > 0:  # another loader in the middle of an epoch
            sampler.load_state_dict(before.state_dict())
        self._train_loader = train_loader
        if self._shares is not None:
            sampler.set_shares(self._shares)
        saved, self._resume_from = self._resume_from, None
        if saved is None and self._is_foreign:
            every = self.config.training.accumulation_steps
            self._position.epoch, step = divmod(self.step, -(-len(sampler) // every))
            sampler.set_epoch(self._position.epoch)
            sampler.commit(step * every)
            seed_rank(self.config.training.seed, self.world.rank, self.step)
            self._is_foreign = False
            return
        if saved is None:
            sampler.set_epoch(self._position.epoch)
            if self.step == 0:  # a later call goes on with the randomness as it is
                seed_rank(self.config.training.seed, self.world.rank)
            return
        sampler.load_state_dict(saved.state["sampler"])
        self._persistence.say_what_changed(sampler.global_batch_size)
        if is_measured(self.config.parallel, self.world) and saved.world_size == self.world.world_size:
            sampler.set_shares(saved.state["shares"])
        if saved.world_size == self.world.world_size:
            restore_rng(saved.rank_states[self.world.rank]["rng"], self.device)
        else:
            seed_rank(self.config.training.seed, self.world.rank, self.step)

    def _save(self, metric: float | None) -> None:
        self._loop.check_whole()
        if self._parts.local is not None:
            self._parts.local.synchronize()
        self._step.finite.check(self.epoch, self.step)
        agree(self.history.flush, on=0)
        stopping = self.early_stopping
        sampler = sampler_of(self._train_loader, "the training loader")
        tensors, state = pack(
            self._parts,
            self._position,
            {
                "sampler": sampler.state_dict(),
                "shares": sampler.shares,
                "history": self.history.state_dict(),
                "best": self._loop.judge.best,
                "stopped_early": self._loop.stopped_early,
                "early_stopping": stopping.state_dict() if stopping is not None else None,
            },
        )
        own = pack_own(self.world.rank, self._parts)
        self._persistence.save(self.step, tensors, state, metric, own)

    def _restore(self, saved: LoadedCheckpoint) -> None:
        """Go back to the checkpoint, all but the cursor and the randomness, which wait for the start of training."""
        configured, changed = hyperparameters(self.optimizer), [change.key for change in self._persistence.changes]
        vars(self._position).update(vars(unpack(saved, self._parts, self.world)))
        apply_changes(self._persistence.changes, self.optimizer, configured)
        if not any(key.startswith("training.best_") for key in changed):
            self._loop.judge.best = saved.state["best"]
        self._loop.stopped_early = saved.state["stopped_early"] and not any("early_stopping" in key for key in changed)
        self.global_batch_size = int(saved.state["sampler"]["global_batch_size"])
        if self._parts.frozen is not None:
            self._parts.frozen.num_steps = self.step
        current = None if self._loop.is_over(epoch_is_open=False) else self.epoch
        self.history.load_state_dict(saved.state["history"], current_epoch=current)
        if self.early_stopping is not None and saved.state["early_stopping"] is not None:
            self.early_stopping.load_state_dict(saved.state["early_stopping"])
