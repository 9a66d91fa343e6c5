"""The network beside the Myrheim-Meyer estimator, on the same test set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everyrank import TrainerDDP
from everyrank.apps.causal_sets.myrheim_meyer import nearest_dimension
from everyrank.apps.causal_sets.task import Output, predict

if TYPE_CHECKING:
    from rich.table import Table
    from torch_geometric.data import Batch

NO_DIMENSION = 0
"""Truth or answer for an order that is no sprinkling."""


@dataclass(frozen=True)
class Comparison:
    """Truth and answers for each test sample, ``NO_DIMENSION`` standing for an order that is no sprinkling.

    Attributes:
        dimensions: The dimensions to choose from.
        truth: True dimension [num_samples].
        network: The network's dimension [num_samples], whether or not it takes the order for a sprinkling.
        network_manifold: Whether the network takes it for one [num_samples].
        estimator: The Myrheim-Meyer estimator's nearest dimension [num_samples]; it takes every order for one.
    """

    dimensions: tuple[int, ...]
    truth: NDArray[np.int64]
    network: NDArray[np.int64]
    network_manifold: NDArray[np.bool_]
    estimator: NDArray[np.int64]

    @property
    def sprinkled(self) -> NDArray[np.bool_]:
        """Which samples are sprinklings [num_samples]."""
        return self.truth != NO_DIMENSION

    def summary(self) -> dict[str, Any]:
        """Return the accuracies as plain numbers."""
        sprinkled = self.sprinkled
        return {
            "num_test_samples": len(self.truth),
            "num_sprinklings": int(sprinkled.sum()),
            "dimension_accuracy": _mean(self.network[sprinkled] == self.truth[sprinkled]),
            "dimension_accuracy_myrheim_meyer": _mean(self.estimator[sprinkled] == self.truth[sprinkled]),
            "manifold_accuracy": _mean(self.network_manifold == sprinkled),
            "layered_orders_found_out": _mean(~self.network_manifold[~sprinkled]),
        }

    def confusion(self, answers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count answers [num_kinds, num_kinds] by true kind (rows) and answer (columns): the dimensions, then none."""
        kinds = [*self.dimensions, NO_DIMENSION]
        return np.array([[int(((self.truth == t) & (answers == a)).sum()) for a in kinds] for t in kinds])

    @property
    def network_answers(self) -> NDArray[np.int64]:
        """The network's whole answer [num_samples]: a dimension, or none."""
        return np.where(self.network_manifold, self.network, NO_DIMENSION)


def compare(trainer: TrainerDDP, samples: Any, dimensions: tuple[int, ...], batch_size: int = 256) -> Comparison:
    """Ask network and estimator about each of the samples. Collective; every rank gets the whole comparison.

    Args:
        trainer: The trainer of the network.
        samples: The test samples: causal sets, or a part of them.
        dimensions: The dimensions to choose from.
        batch_size: Samples per rank and batch.
    """
    names = torch.tensor([*dimensions, NO_DIMENSION])  # the class -1 finds the last

    def answer(output: Output, data: Batch) -> dict[str, Tensor]:
        dimension, manifold = (told.cpu() for told in predict(output))
        fraction = data.ordering_fraction.cpu().numpy()
        return {
            "truth": names[data.dimension.cpu()],
            "network": names[dimension],
            "network_manifold": manifold,
            "estimator": torch.from_numpy(nearest_dimension(fraction, dimensions)),
        }

    answers = trainer.predict(samples, answer, batch_size)
    return Comparison(dimensions, **{name: tensor.numpy() for name, tensor in answers.items()})


def make_table(comparison: Comparison) -> Table:
    """Lay out the accuracies, with their statistical errors, for the terminal."""
    from rich.table import Table

    table = Table(title=f"Test accuracy on {len(comparison.truth):,} causal sets", title_justify="left")
    for title, justify in (("", "left"), ("samples", "right"), ("network", "right"), ("Myrheim-Meyer", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for row in _rows(comparison):
        table.add_row(*row)
    return table


def _rows(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    truth, sprinkled = comparison.truth, comparison.sprinkled
    names = ", ".join(map(str, comparison.dimensions))
    right, estimated = comparison.network == truth, comparison.estimator == truth
    questions = [(f"dimension ({names})", sprinkled)]
    questions += [(f"  of dimension {dimension}", truth == dimension) for dimension in comparison.dimensions]
    for question, asked in questions:
        yield question, f"{asked.sum():,}", _percent(right[asked]), _percent(estimated[asked])
    found = comparison.network_manifold == sprinkled
    for question, asked in (
        ("manifold-like or not", np.ones_like(sprinkled)),
        ("  sprinklings", sprinkled),
        ("  Kleitman-Rothschild", ~sprinkled),
    ):
        # The estimator gives every order a dimension: it cannot say that an order has none.
        yield question, f"{asked.sum():,}", _percent(found[asked]), _percent(sprinkled[asked])


def _percent(right: NDArray[np.bool_]) -> str:
    """Write a share with its error: the half-width of Wilson's interval at one sigma, which is not 0 at 100 %."""
    if len(right) == 0:
        return "-"
    share, num = _mean(right), len(right)
    error = math.sqrt(share * (1 - share) / num + 1 / (4 * num**2)) / (1 + 1 / num)
    return f"{100 * share:.2f} ± {100 * error:.2f} %"


def _mean(right: NDArray[np.bool_]) -> float:
    return float(right.mean()) if len(right) else math.nan
