"""The app: make the data, train, and compare with the classical estimators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from everyrank import ConfigError, GNNModel, TrainerDDP, hash_weights, join, read_app_config
from everyrank.apps.causal_sets import figure
from everyrank.apps.causal_sets.comparison import Comparison, compare
from everyrank.apps.causal_sets.dataset import NUM_GRAPH_FEATURES, NUM_NODE_FEATURES, CausalSetDataset
from everyrank.apps.causal_sets.samples import SPACETIMES
from everyrank.apps.causal_sets.settings import read_settings
from everyrank.apps.causal_sets.tables import make_tables
from everyrank.apps.causal_sets.task import HEADS

if TYPE_CHECKING:
    from omegaconf import DictConfig


class CausalSetsApp:
    """Trains a graph network to tell dimension and curvature of a causal set, and a spacetime from any other order.

    ``cfg.app`` holds the sections of :class:`everyrank.TrainerDDP`; see ``conf/app/causal_sets.yaml``.
    """

    def run(self, cfg: DictConfig) -> dict[str, Any]:
        """Run on this rank.

        Args:
            cfg: The resolved configuration of the run.

        Returns:
            The accuracies on the test set, the network's beside the estimators', and a hash of the weights.
        """
        config = self.trainer_config(cfg)
        with join(**cfg.distributed) as world:
            trainer = TrainerDDP(config=config, world=world)
            dataset = CausalSetDataset(**config["data"]["kwargs"])
            loaders = trainer.prepare_dataloaders(dataset, split=config["data"]["split"])
            trainer.run_training(*loaders[:2])
            trainer.run_test(loaders[2])
            comparison = compare(trainer, loaders[2].dataset, dataset.dimensions)
            if world.is_main:
                _write(trainer, comparison)
            return {**comparison.summary(), "weights": hash_weights(trainer.module)}

    def trainer_config(self, cfg: DictConfig) -> dict[str, Any]:
        """Return ``cfg.app`` as the trainer's configuration, with what follows from the data filled in.

        Raises:
            ConfigError: The data are configured wrongly, or the model does not fit them.
        """
        config = read_app_config(cfg)
        settings = read_settings({key: value for key, value in config["data"]["kwargs"].items() if key != "folder"})
        complete_model(config["model"], num_dimensions=len(settings.dimensions))
        return config


def complete_model(model: dict[str, Any], num_dimensions: int) -> None:
    """Fill in the widths that follow from the data.

    Raises:
        ConfigError: A width was set to something else, or a head is missing.
    """
    heads = model.setdefault("heads", {})
    problems = [f"model.heads.{name}: missing; the loss needs it." for name in HEADS if name not in heads]
    if problems:
        raise ConfigError("The model does not fit the causal sets.", problems)
    follows: list[tuple[dict[str, Any], str, str, int]] = [
        (model, "model", "in_dim", NUM_NODE_FEATURES),
        (model, "model", "graph_dim", NUM_GRAPH_FEATURES),
        (heads["dimension"], "model.heads.dimension", "out_dim", num_dimensions),
        (heads["curvature"], "model.heads.curvature", "out_dim", len(SPACETIMES)),
        (heads["manifold"], "model.heads.manifold", "out_dim", 1),
    ]
    for section, path, key, value in follows:
        found = section.setdefault(key, value)
        if found != value:
            problems.append(f"{path}.{key}: found {found}, but the data ask for {value}. Leave it out.")
    if problems:
        raise ConfigError("The model does not fit the causal sets.", problems)


def _write(trainer: TrainerDDP, comparison: Comparison) -> None:
    """Save the model and the figure, and print the tables and save them as text, on rank 0."""
    from rich.console import Console

    if isinstance(trainer.module, GNNModel):
        trainer.module.save(trainer.run / "model.safetensors")
    figure.draw(trainer.run / "causal_sets.png", comparison, trainer.history.epochs)
    tables = make_tables(comparison)
    with open(trainer.run / "causal_sets.txt", "w", encoding="utf-8") as file:
        Console(file=file, width=100).print(*tables, sep="\n")
    console = Console()
    console.print(*tables, sep="\n")
    console.print(f"Figure: {trainer.run / 'causal_sets.png'}", soft_wrap=True, highlight=False)
