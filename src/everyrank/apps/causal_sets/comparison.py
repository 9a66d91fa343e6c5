"""The network beside the classical estimators, on the same test set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from everyrank import TrainerDDP
from everyrank.apps.causal_sets import calibration
from everyrank.apps.causal_sets.estimators import estimate_dimension, midpoint_scaling_dimension, nearest_dimension
from everyrank.apps.causal_sets.samples import KINDS, NO_DIMENSION, OTHERS, SPACETIMES
from everyrank.apps.causal_sets.task import HEADS, Output, probabilities

if TYPE_CHECKING:
    from torch_geometric.data import Batch


@dataclass(frozen=True)
class Comparison:
    """Truth and answers for each test sample.

    Attributes:
        dimensions: The dimensions to choose from.
        kind: Index into ``KINDS`` [num_samples].
        truth: True dimension [num_samples], ``NO_DIMENSION`` for an order that is no sprinkling.
        size: Number of elements n [num_samples].
        p_dimension: The network's probability of each dimension [num_samples, num_dimensions], given a sprinkling.
        p_curvature: Of negative, no and positive curvature [num_samples, 3], given a sprinkling.
        p_manifold: That the order is a sprinkling [num_samples].
        myrheim_meyer: That estimator's dimension, a real number [num_samples].
        midpoint: The midpoint-scaling estimator's dimension, a real number [num_samples].
    """

    dimensions: tuple[int, ...]
    kind: NDArray[np.int64]
    truth: NDArray[np.int64]
    size: NDArray[np.int64]
    p_dimension: NDArray[np.float64]
    p_curvature: NDArray[np.float64]
    p_manifold: NDArray[np.float64]
    myrheim_meyer: NDArray[np.float64]
    midpoint: NDArray[np.float64]

    @property
    def sprinkled(self) -> NDArray[np.bool_]:
        """Which samples are sprinklings [num_samples]."""
        return self.truth != NO_DIMENSION

    def is_kind(self, name: str) -> NDArray[np.bool_]:
        """Which samples are of a kind in ``KINDS`` [num_samples]."""
        return self.kind == KINDS.index(name)

    def right(self, question: str, who: str = "network") -> NDArray[np.bool_]:
        """Which samples [num_samples] are answered rightly.

        Args:
            question: ``dimension``, ``curvature`` or ``manifold``; the first two mean nothing where there is none.
            who: ``network``; for the dimension also ``myrheim_meyer`` or ``midpoint``, taken to the nearest choice.
        """
        if question == "manifold":
            return (self.p_manifold > 0.5) == self.sprinkled
        if question == "curvature":
            sign = self.p_curvature.argmax(axis=1) - 1
            return sign == np.array([SPACETIMES.get(kind, 2) for kind in KINDS])[self.kind]
        if who == "network":
            return np.array(self.dimensions)[self.p_dimension.argmax(axis=1)] == self.truth
        return nearest_dimension(getattr(self, who), self.dimensions) == self.truth

    def reliability(self, question: str) -> tuple[calibration.Reliability, tuple[float, float]]:
        """Return how true the network's probabilities are, and the error (mean, deviation) if they were all true."""
        asked = np.ones_like(self.sprinkled) if question == "manifold" else self.sprinkled
        held = {
            "dimension": self.p_dimension.max(axis=1),
            "curvature": self.p_curvature.max(axis=1),
            "manifold": np.maximum(self.p_manifold, 1 - self.p_manifold),
        }[question][asked]
        return calibration.measure(held, self.right(question)[asked]), calibration.error_of_the_calibrated(held)

    def confusion(self) -> tuple[list[str], list[str], NDArray[np.int64]]:
        """Count who is taken for what.

        Returns:
            The true kinds (spacetimes by dimension, then the others), the answers (spacetimes by dimension, then
            "none"), and the counts [num_kinds, num_answers].
        """
        places = [(name, dimension) for name in SPACETIMES for dimension in self.dimensions]
        truths = [self.is_kind(name) & (self.truth == dimension) for name, dimension in places]
        truths += [self.is_kind(name) for name in OTHERS]
        answer = self.p_curvature.argmax(axis=1) * len(self.dimensions) + self.p_dimension.argmax(axis=1)
        answer = np.where(self.p_manifold > 0.5, answer, len(places))
        counts = [np.bincount(answer[rows], minlength=len(places) + 1) for rows in truths]
        names = [f"{KIND_TITLES[name]} {dimension}" for name, dimension in places]
        return [*names, *(KIND_TITLES[name] for name in OTHERS)], [*names, "none"], np.array(counts)

    def summary(self) -> dict[str, Any]:
        """Return the accuracies and calibration errors as plain numbers."""
        asked = self.sprinkled
        found: dict[str, Any] = {
            "num_test_samples": len(self.truth),
            "num_sprinklings": int(asked.sum()),
            "dimension_accuracy": mean(self.right("dimension")[asked]),
            "dimension_accuracy_myrheim_meyer": mean(self.right("dimension", "myrheim_meyer")[asked]),
            "dimension_accuracy_midpoint": mean(self.right("dimension", "midpoint")[asked]),
            "curvature_accuracy": mean(self.right("curvature")[asked]),
            "manifold_accuracy": mean(self.right("manifold")),
        }
        for question in HEADS:
            if question == "manifold" or asked.any():
                found[f"{question}_calibration_error"] = self.reliability(question)[0].error
        return found


KIND_TITLES = {
    "anti_de_sitter": "anti-de Sitter",
    "minkowski": "Minkowski",
    "de_sitter": "de Sitter",
    "kleitman_rothschild": "Kleitman-Rothschild",
    "layered": "layered",
    "percolation": "percolation",
    "product": "product order",
    "quotient": "quotient",
}


def compare(trainer: TrainerDDP, samples: Any, dimensions: tuple[int, ...], batch_size: int = 256) -> Comparison:
    """Ask network and estimators about each of the samples. Collective; every rank gets the whole comparison.

    Args:
        trainer: The trainer of the network.
        samples: The test samples: causal sets, or a part of them.
        dimensions: The dimensions to choose from.
        batch_size: Samples per rank and batch.
    """
    names = torch.tensor([*dimensions, NO_DIMENSION])  # the class -1 finds the last

    def answer(output: Output, data: Batch) -> dict[str, Tensor]:
        told = {f"p_{name}": value.cpu() for name, value in probabilities(output).items()}
        size, half = data.num_elements.cpu(), data.half_size.cpu()
        return {
            **told,
            "kind": data.kind.cpu(),
            "truth": names[data.dimension.cpu()],
            "size": size,
            "myrheim_meyer": torch.from_numpy(estimate_dimension(data.ordering_fraction.cpu().numpy())),
            "midpoint": torch.from_numpy(midpoint_scaling_dimension(size.numpy(), half.numpy())),
        }

    answers = trainer.predict(samples, answer, batch_size)
    return Comparison(dimensions, **{name: tensor.numpy() for name, tensor in answers.items()})


def mean(right: NDArray[np.bool_]) -> float:
    """Return the share of right answers, NaN for none."""
    return float(right.mean()) if len(right) else math.nan


def standard_error(share: ArrayLike, num: ArrayLike) -> NDArray[np.float64]:
    """Return the error of shares of ``num`` answers each: the half-width of Wilson's interval at one sigma.

    Not 0 at 100 % (Wilson 1927, J. Amer. Statist. Assoc. 22, 209).
    """
    share, num = np.asarray(share, dtype=np.float64), np.asarray(num, dtype=np.float64)
    return np.sqrt(share * (1 - share) / num + 1 / (4 * num**2)) / (1 + 1 / num)
