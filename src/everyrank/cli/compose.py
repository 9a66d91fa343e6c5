"""Composing a configuration from the command line: Hydra lives here alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from everyrank.cli.compose_errors import explain
from everyrank.errors import UserError


def compose(argv: Sequence[str]) -> list[DictConfig]:
    """The configurations that ``argv`` (Hydra's grammar) describes, one a job of a multirun.

    Raises:
        UserError: They cannot be composed.
    """
    composed: list[DictConfig] = []
    for_each_composed(list(argv), composed.append)
    return composed


def for_each_composed(argv: list[str], task: Callable[[DictConfig], Any]) -> None:
    """Compose the configurations that ``argv`` describes and call ``task`` with each, one a job of a multirun.

    Raises:
        UserError: They cannot be composed, or the first that ``task`` raised.
    """
    mistakes: list[UserError] = []

    def attempt(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except UserError as mistake:  # Hydra would print a line of its own about it
            mistakes.append(mistake)
            return None

    # The variables of an environment have names of the user's own, which Hydra's struct mode would refuse.
    argv = [f"++{arg}" if arg.startswith("env.variables.") else arg for arg in argv]
    conf = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "conf")
    try:
        if any(arg.startswith("-") or arg.lstrip("+~").startswith("hydra") for arg in argv):
            _by_hydras_main(conf, argv, attempt)
        else:
            _one_job(conf, argv, attempt)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    if mistakes:
        raise mistakes[0]


def _one_job(conf: str, settings: list[str], task: Callable[[DictConfig], Any]) -> None:
    """Settings alone, none of them Hydra's own. Hydra's main would compose twice, to look for its mode first."""
    with hydra.initialize_config_dir(conf, job_name="compose", version_base="1.3"):
        cfg = hydra.compose("config", overrides=settings, return_hydra_config=True)
        with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
            cfg.hydra.runtime.output_dir = os.path.abspath(cfg.hydra.run.dir)
        previous = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        try:
            task(cfg)
        finally:
            HydraConfig.instance().cfg = previous


def _by_hydras_main(conf: str, argv: list[str], task: Callable[[DictConfig], Any]) -> None:
    previous = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["everyrank run", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them with exit code 1
    try:
        hydra.main(version_base="1.3", config_path=conf, config_name="config")(task)()
    finally:
        sys.argv = previous[0]
        if previous[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]


def as_text(value: object) -> str:
    """Write a value so that Hydra's grammar takes it for text, whatever it looks like, and nobody interpolates it."""
    return QuotedString(str(value).replace("${", "\\${"), Quote.single).with_quotes()
