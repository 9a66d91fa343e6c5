"""Network beside estimator: every sample once at every world size, and numbers that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import everyrank
from everyrank.apps.causal_sets import figure
from everyrank.apps.causal_sets.comparison import Comparison, compare, make_table
from everyrank.apps.causal_sets.dataset import CausalSetDataset
from everyrank.apps.causal_sets.task import compute_loss

SETTINGS = {"num_samples": 90, "mean_size": 24, "dimensions": [2, 4], "layered_fraction": 0.3}
MODEL = {
    "in_dim": 6,
    "blocks": [{"out_dim": 4}],
    "heads": {"dimension": {"out_dim": 2}, "manifold": {"out_dim": 1}},
}


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        dimensions=(2, 4),
        truth=np.array([2, 2, 4, 4, 0, 0]),
        network=np.array([2, 4, 4, 4, 2, 2]),
        network_manifold=np.array([True, True, True, False, False, True]),
        estimator=np.array([2, 2, 2, 4, 2, 4]),
    )


def test_counts_by_hand(comparison: Comparison) -> None:
    assert comparison.summary() == {
        "num_test_samples": 6,
        "num_sprinklings": 4,
        "dimension_accuracy": 0.75,
        "dimension_accuracy_myrheim_meyer": 0.75,
        "manifold_accuracy": pytest.approx(4 / 6),
        "layered_orders_found_out": 0.5,
    }
    assert comparison.confusion(comparison.network_answers).tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    assert comparison.confusion(comparison.estimator).tolist() == [[2, 0, 0], [1, 1, 0], [1, 1, 0]]


def test_table_and_figure(comparison: Comparison, tmp_path: Path) -> None:
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_table(comparison))
    console.file.close()
    text = console.export_text()
    for cell in ("dimension (2, 4)", "75.00 ± 20.00 %", "Kleitman-Rothschild", "50.00 ± 28.87 %", "0.00 ± 16.67 %"):
        assert cell in text
    epochs = [{"epoch": 0, "train_loss": 1.5, "val_loss": 1.2, "val_accuracy": 0.4}, {"epoch": 1, "train_loss": 0.5}]
    for training in (epochs, []):
        figure.draw(tmp_path / "figure.png", comparison, training)
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_every_sample_is_asked_about_once_at_every_world_size(tmp_path: Path) -> None:
    """Also where there are more ranks than samples."""
    questions = [[*range(80, 90), *range(3, 40, 2), 0], [7, 5]]

    def on_rank() -> list[list[list[int]]]:
        from torch.utils.data import Subset

        with everyrank.join(backend="gloo") as world:
            config = {
                "criterion": compute_loss,
                "model": {"type": "GNNModel", **MODEL},
                "training": {
                    "path": str(tmp_path / f"run{world.size}"),
                    "num_epochs": 0,
                    "batch_size": 1,
                    "dtype": "float64",
                },
                "parallel": {},
            }
            trainer, dataset = everyrank.TrainerDDP(config=config), CausalSetDataset(tmp_path, **SETTINGS)
            found = [compare(trainer, Subset(dataset, asked), dataset.dimensions, 4) for asked in questions]
        names = ("truth", "network", "network_manifold", "estimator")
        return [[getattr(comparison, name).tolist() for name in names] for comparison in found]

    results = {size: everyrank.launch(on_rank, nproc_per_node=size) for size in (1, 3)}
    assert results[3] == results[1] * 3, "all ranks have the answers of one process"
    dataset = CausalSetDataset(tmp_path, **SETTINGS)
    for indices, (truth, *_) in zip(questions, results[1][0], strict=True):
        labels = [dataset[index].dimension.item() for index in indices]
        assert truth == [{0: 2, 1: 4, -1: 0}[label] for label in labels]
