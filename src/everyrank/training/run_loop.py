"""A run from where it is to its end: steps, validations, decisions and what is saved after them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NoReturn

from everyrank.data.sampler import GlobalBatchSampler
from everyrank.errors import EXIT_OK, UserError
from everyrank.runtime.agreement import agree
from everyrank.runtime.logs import get_logger
from everyrank.runtime.preemption import PreemptionWatch
from everyrank.runtime.world import World
from everyrank.training.config import TrainerConfig
from everyrank.training.decisions.agenda import Agenda
from everyrank.training.decisions.batch_statistics import look_at_statistics
from everyrank.training.decisions.judge import Judge
from everyrank.training.evaluation.evaluators import DefaultValidator, EvaluationResult
from everyrank.training.failures import SignalNoticed
from everyrank.training.loaders import sampler_of
from everyrank.training.loop import EpochLoop, Position
from everyrank.training.parallel.shares import SpeedMeter
from everyrank.training.saving.ledger import Ledger
from everyrank.training.shared_model import Evaluation
from everyrank.training.step import TrainStep, step_by_results
from everyrank.training.tracking.history import History, Row
from everyrank.training.tracking.observers import Observers

logger = get_logger("training")


@dataclass(kw_only=True)
class RunLoop:
    """Trains epoch after epoch, and does what is due between the steps.

    Attributes:
        config: The whole configuration.
        world: The joined world.
        position: Where the run is; kept up to date.
        history: Where results are recorded.
        step: Takes one optimizer step.
        scheduler: The scheduler, or None.
        judge: Decides what follows from results.
        evaluation: Evaluates the model.
        validator: How it is evaluated.
        save: Called, on all ranks, where a checkpoint is due, with the value that it is ranked by or None.
        stopped_early: Whether early stopping has ended the run.
        watch: Notices signals; None: they are not looked for.
        until_step: Save after this step and end the program; None: go on to the end.
        meter: Shares the batches of each epoch by the ranks' speed in the last; None: they are shared as they are.
    """

    config: TrainerConfig
    world: World
    position: Position
    history: History
    step: TrainStep
    scheduler: Any
    judge: Judge
    evaluation: Evaluation
    validator: DefaultValidator
    save: Callable[[float | None], None]
    stopped_early: bool = False
    watch: PreemptionWatch | None = None
    until_step: int | None = None
    meter: SpeedMeter | None = None
    _failure: str = field(default="", init=False)
    _sync_every: int = field(default=1, init=False)

    @cached_property
    def _agenda(self) -> Agenda:
        return Agenda(self.config)

    def is_over(self, *, epoch_is_open: bool) -> bool:
        """Return whether there is nothing more to do; ``epoch_is_open`` if the current epoch is not concluded."""
        return self.stopped_early or self._agenda.is_over(self.position, epoch_is_open=epoch_is_open)

    def run(
        self, train_loader: Any, val_loader: Any, ledger: Ledger | None, observers: Observers, until_epoch: int | None
    ) -> Iterator[Row]:
        """Train to the end; yield the row of each epoch and validation when all is decided and saved.

        Raises:
            UserError: An earlier call failed in the middle of a step.
        """
        self.check_whole()
        with self._noting_failure():
            position, agenda = self.position, self._agenda
            sampler = sampler_of(train_loader, "the training loader")
            loop = EpochLoop(
                step=self.step,
                world=self.world,
                config=self.config.training,
                position=position,
                history=self.history,
                ledger=ledger,
                stops=(*agenda.stops, *([self.until_step] if self.until_step else [])),
                sync_every=self._sync_every,  # what an earlier call has found
            )
            batches = loop.batches_from(sampler, sampler.next_batch % len(sampler))
            look_at_statistics(self.step.module, sampler, batches)
            if val_loader is not None and self._owes_a_validation(sampler):
                yield self._conclude("validation", self._validate(val_loader), time.monotonic(), sampler)
            while not self.is_over(epoch_is_open=self._epoch_is_open(sampler)):
                if until_epoch is not None and position.epoch >= until_epoch:
                    return
                started = time.monotonic()
                for losses in loop.run(train_loader):
                    self._sync_every = loop.sync_every
                    observers.steps(position, losses)
                    ends = agenda.ends_here(position, epoch_is_trained=_is_trained(sampler))
                    if val_loader is not None and agenda.validates_at_step(position.step) and not ends:
                        yield self._conclude("validation", self._validate(val_loader), started, sampler)
                    elif agenda.saves_at_step(position.step):
                        self.save(None)
                    self._stop_if_signalled()
                    if position.step == self.until_step and not _is_trained(sampler):
                        self._save_and_exit()
                    if self.stopped_early:
                        return
                further = {**({"rank_seconds": shares} if (shares := loop.rank_seconds()) else {}), **loop.figures()}
                result = self._validate(val_loader) if agenda.validates_after(position) else None
                yield self._conclude("epoch", result, started, sampler, further)
                if position.step == self.until_step:
                    self._save_and_exit()

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except (SignalNoticed, GeneratorExit):
            raise
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def check_whole(self) -> None:
        """Raise if the weights hold steps that nothing else knows of.

        Raises:
            UserError: An earlier call failed in the middle of a step.
        """
        if self._failure:
            raise UserError(
                f"This trainer failed in the middle of a step ({self._failure}): its weights may hold samples that its "
                "cursor does not count, so going on would use them twice. Fix: make a new trainer, which goes on from "
                "the newest checkpoint."
            )

    def _save_and_exit(self) -> NoReturn:
        self.save(None)
        raise SystemExit(EXIT_OK)

    def _epoch_is_open(self, sampler: GlobalBatchSampler) -> bool:
        """Whether steps of the current epoch are done that no row of the history concludes."""
        last = self.history.epochs[-1:]
        return sampler.position > 0 and not (last and last[0]["epoch"] == self.position.epoch)

    def _owes_a_validation(self, sampler: GlobalBatchSampler) -> bool:
        """Whether a signal came into the validation that was due after the last step."""
        position, rows = self.position, self.history.rows[-1:]
        is_due = self.history.num_rows > 0 and self._agenda.validates_at_step(position.step)
        ends = self._agenda.ends_here(position, epoch_is_trained=_is_trained(sampler))
        return is_due and not ends and not (rows and rows[0]["step"] == position.step)

    def _validate(self, val_loader: Any) -> EvaluationResult | None:
        if val_loader is None:
            return None

        def look_up() -> None:
            if (self.validator.batch + 1) % self._sync_every == 0:
                self._stop_if_signalled()

        between_batches = look_up if self.config.validation.on == "all" else None
        result = self.evaluation.evaluate(self.validator, val_loader, self.position, between_batches=between_batches)
        self._stop_if_signalled()
        self.validator.report(result)
        return result

    def _conclude(
        self,
        kind: Literal["epoch", "validation"],
        result: EvaluationResult | None,
        started: float,
        sampler: GlobalBatchSampler,
        further: Mapping[str, Any] | None = None,
    ) -> Row:
        """Record an epoch or a validation, decide, step the scheduler, move on and save what is due."""
        training, position = self.config.training, self.position
        values = {"train_loss": position.mean_loss}
        if result is not None:
            values.update({f"val_{name}": value for name, value in result.as_dict().items()})
        row: Row = {"epoch": position.epoch, "step": position.step, **values}
        row.update(lr=float(self.step.optimizer.param_groups[0]["lr"]), seconds=time.monotonic() - started)
        row.update(further or {})
        verdict = self.judge.decide(position.epoch, values, validated=result is not None)
        moves_on = kind == "epoch" and _is_trained(sampler)
        step_by_results(self.scheduler, self.config, values, epoch_ended=moves_on)
        if kind == "epoch":
            is_due = self._agenda.saves_after(position)
            if self.world.is_main:
                of = f"/{training.num_epochs}" if training.num_epochs is not None else ""
                text = "Epoch %d%s: train_loss=%.4g, %.1f s"
                logger.info(text, position.epoch + 1, of, position.mean_loss, row["seconds"])
        else:
            is_due = self._agenda.saves_at_step(position.step)
            del row["train_loss"]  # of an epoch that goes on
        row = agree(partial(self.history.add_result, kind, row))  # rank 0's disk may be full
        if moves_on:
            position.epoch += 1
            position.loss_sum, position.num_samples = 0.0, 0
            sampler.set_epoch(position.epoch)
            if self.meter is not None:
                self.meter.new_epoch(self.world)
        self.stopped_early = verdict.stop
        if is_due or verdict.improved or verdict.stop:
            self.save(values.get(training.best_metric))
        return row

    def _stop_if_signalled(self) -> None:
        if self.step.local is not None and self.step.local.num_apart:
            return  # a checkpoint here would be a sync that the uninterrupted run does not have
        if self.watch is not None and (signal_name := self.watch.agreed()) is not None:
            raise SignalNoticed(signal_name)


def _is_trained(sampler: GlobalBatchSampler) -> bool:
    return sampler.next_batch == len(sampler)
