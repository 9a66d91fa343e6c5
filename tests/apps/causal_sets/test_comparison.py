"""Network beside estimators: every sample once at every world size, and numbers that can be counted by hand."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import everyrank
from everyrank.apps.causal_sets import figure
from everyrank.apps.causal_sets.comparison import Comparison, compare
from everyrank.apps.causal_sets.dataset import CausalSetDataset
from everyrank.apps.causal_sets.samples import KINDS
from everyrank.apps.causal_sets.tables import make_tables, octaves
from everyrank.apps.causal_sets.task import compute_loss

SETTINGS = {"num_samples": 90, "min_size": 16, "max_size": 32, "dimensions": [2, 4], "others_fraction": 0.3}
MODEL = {
    "in_dim": 6,
    "blocks": [{"out_dim": 4}],
    "heads": {"dimension": {"out_dim": 2}, "curvature": {"out_dim": 3}, "manifold": {"out_dim": 1}},
}


@pytest.fixture
def comparison() -> Comparison:
    kinds = ["minkowski", "minkowski", "de_sitter", "de_sitter", "layered", "quotient"]
    return Comparison(
        dimensions=(2, 4),
        kind=np.array([KINDS.index(kind) for kind in kinds]),
        truth=np.array([2, 2, 4, 4, 0, 0]),
        size=np.array([16, 40, 17, 80, 31, 64]),
        p_dimension=np.array([[0.9, 0.1], [0.3, 0.7], [0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.8, 0.2]]),
        p_curvature=np.array([[0.1, 0.8, 0.1]] * 2 + [[0.1, 0.2, 0.7]] + [[0.2, 0.5, 0.3]] * 3),
        p_manifold=np.array([0.9, 0.8, 0.9, 0.4, 0.1, 0.7]),
        myrheim_meyer=np.array([2.2, 2.9, 2.8, 3.4, 2.4, np.inf]),
        midpoint=np.array([1.2, 3.1, 4.8, 3.4, 2.4, 3.0]),
    )


def test_counts_by_hand(comparison: Comparison) -> None:
    summary = comparison.summary()
    assert {name: value for name, value in summary.items() if not name.endswith("calibration_error")} == {
        "num_test_samples": 6,
        "num_sprinklings": 4,
        "dimension_accuracy": 0.75,
        "dimension_accuracy_myrheim_meyer": 0.75,
        "dimension_accuracy_midpoint": 0.75,
        "curvature_accuracy": 0.75,
        "manifold_accuracy": pytest.approx(4 / 6),
    }
    assert summary["dimension_calibration_error"] == pytest.approx((2 * abs(1 - 0.9) + 0.7 + 0.4) / 4)
    truths, answers, counts = comparison.confusion()
    spacetimes = ("anti-de Sitter", "Minkowski", "de Sitter")
    assert answers == [*(f"{name} {d}" for name in spacetimes for d in (2, 4)), "none"]
    found = [(truths[row], answers[column], counts[row, column]) for row, column in np.argwhere(counts)]
    assert found == [
        ("Minkowski 2", "Minkowski 2", 1),
        ("Minkowski 2", "Minkowski 4", 1),
        ("de Sitter 4", "de Sitter 4", 1),
        ("de Sitter 4", "none", 1),
        ("layered", "none", 1),
        ("quotient", "Minkowski 2", 1),
    ]


def test_octaves_hold_every_size() -> None:
    assert list(octaves(np.array([16, 128, 30]))) == [(16, 32), (32, 64), (64, 129)]
    assert list(octaves(np.array([16, 24]))) == [(16, 25)]
    assert list(octaves(np.array([7]))) == [(7, 8)]


def test_tables_and_figure(comparison: Comparison, tmp_path: Path) -> None:
    def rows(shown: Comparison) -> list[list[str]]:
        console = Console(file=io.StringIO(), width=100)
        console.print(*make_tables(shown), sep="\n")
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]

    found = rows(comparison)
    assert found[0] == ["dimension (2, 4)", "4", *["75.0 ± 20.0"] * 3]
    assert ["de Sitter", "2", "50.0 ± 28.9", "", ""] in found
    assert ["quotient", "1", "0.0 ± 25.0", "", ""] in found
    assert ["Kleitman-Rothschild", "0", "-", "", ""] in found
    assert ["16-31", "100.0 ± 16.7", "50.0 ± 28.9", *["100.0 ± 16.7"] * 2, "100.0 ± 12.5"] in found
    assert ["Minkowski 2", "Minkowski 4", "50 % of 2"] in found
    assert [row[1] for row in found if row[0] == "dimension"] == ["32.50 %"]
    nothing = {name: value[4:] for name, value in vars(comparison).items() if name != "dimensions"}
    no_spacetime = Comparison(dimensions=(2, 4), **nothing)
    assert ["dimension (2, 4)", "0", "-", "-", "-"] in rows(no_spacetime)
    epochs = [{"epoch": 0, "train_loss": 1.5, "val_loss": 1.2}, {"epoch": 1, "train_loss": 0.5}]
    for shown, training in ((comparison, epochs), (no_spacetime, [])):
        figure.draw(tmp_path / "figure.png", shown, training)
        assert re.match(rb"\x89PNG", (tmp_path / "figure.png").read_bytes())


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
                    "path": str(tmp_path / f"run{world.world_size}"),
                    "num_epochs": 0,
                    "batch_size": 1,
                    "dtype": "float64",
                },
                "parallel": {},
            }
            trainer, dataset = everyrank.TrainerDDP(config=config), CausalSetDataset(tmp_path, **SETTINGS)
            found = [compare(trainer, Subset(dataset, asked), dataset.dimensions, 4) for asked in questions]
        names = ("truth", "kind", "size", "p_dimension", "p_curvature", "p_manifold", "myrheim_meyer", "midpoint")
        return [[getattr(comparison, name).tolist() for name in names] for comparison in found]

    results = {n: everyrank.launch(on_rank, nproc_per_node=n, preload=("torch_geometric",)) for n in (1, 3)}
    assert results[3] == results[1] * 3, "all ranks have the answers of one process"
    dataset = CausalSetDataset(tmp_path, **SETTINGS)
    for indices, (truth, *_) in zip(questions, results[1][0], strict=True):
        labels = [dataset[index].dimension.item() for index in indices]
        assert truth == [{0: 2, 1: 4, -1: 0}[label] for label in labels]
