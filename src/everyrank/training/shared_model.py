"""Evaluating the model of a run: with its averaged weights, the same buffers on all ranks, and blame for what fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from everyrank.errors import DataError
from everyrank.runtime.collectives import gather_objects
from everyrank.runtime.world import World
from everyrank.training.evaluation.evaluators import DefaultValidator, EvaluationResult
from everyrank.training.failures import SignalNoticed, explain
from everyrank.training.loaders import sampler_of
from everyrank.training.loop import Position
from everyrank.training.parallel.wrapping import send_buffers
from everyrank.training.parts import Parts

Answers = Tensor | Mapping[str, Tensor]


class Evaluation:
    """Evaluates one model.

    Args:
        parts: What the run is made of.
        world: The joined world.
    """

    def __init__(self, parts: Parts, world: World) -> None:
        self._module, self._ema, self._local, self._world = parts.module, parts.ema, parts.local, world

    def evaluate(
        self,
        evaluator: DefaultValidator,
        loader: Any,
        position: Position,
        together: bool = True,
        between_batches: Callable[[], None] | None = None,
    ) -> EvaluationResult:
        """Return what ``evaluator`` finds. Collective, unless rank 0 evaluates its own model alone (not together)."""
        with self._model_of_all(evaluator, loader, position, together):
            return evaluator.evaluate(self._module, loader, between_batches)

    def predict(
        self, evaluator: DefaultValidator, loader: Any, function: Callable[[Any, Any], Answers], position: Position
    ) -> Any:
        """Return ``function(output, data)`` of all samples, in the loader's order, on every rank. Collective."""
        parts: list[tuple[int, dict[str, Tensor]]] = []
        sampler = sampler_of(loader, "the loader")
        with self._model_of_all(evaluator, loader, position):
            for number, output, data in evaluator.outputs(self._module, loader):
                if num_samples := sampler.share(number).num_local:
                    parts.append((number, _checked(function(output, data), num_samples)))
        gathered = [(number, rank, part) for rank, found in enumerate(gather_objects(parts)) for number, part in found]
        answers = [part for _, _, part in sorted(gathered, key=lambda item: item[:2])]
        whole = {name: torch.cat([part[name] for part in answers]) for name in answers[0]}
        return whole[""] if list(whole) == [""] else whole

    @contextmanager
    def _model_of_all(
        self, evaluator: DefaultValidator, loader: Any, position: Position, together: bool = True
    ) -> Iterator[None]:
        if not together:
            pass  # the other ranks may be gone
        elif self._local is None:
            send_buffers(self._module, self._world)
        else:
            self._local.synchronize()
        average = self._ema if self._ema is not None and self._ema.config.evaluate else None
        evaluator.step = position.step
        try:
            with average.in_place_of_weights() if average is not None else nullcontext():
                yield
        except SignalNoticed:
            raise
        except Exception as error:
            told = explain(error, self._world, f"epoch {position.epoch}, {evaluator.where(loader)}")
            if told is error:
                raise
            raise told from error


def _checked(answers: Answers, num_samples: int) -> dict[str, Tensor]:
    named = dict(answers) if isinstance(answers, Mapping) else {"": answers}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != num_samples:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise DataError(
                f"predict's function returned {name or 'an answer'} with {found} for {num_samples} samples. Fix: "
                "return a tensor, or a mapping of tensors, whose first dimension is the number of samples."
            )
    return {name: tensor.detach().cpu() for name, tensor in named.items()}
