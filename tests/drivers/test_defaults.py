"""A default is written once: the group files say what the classes say."""

from __future__ import annotations

import dataclasses
import runpy

import pytest
import yaml

from conftest import ROOT
from everyrank.cli.run_config import DistributedConfig, EnvConfig, RunConfig

CONF = ROOT / "src" / "everyrank" / "conf"
SCRIPT = "scripts/write_driver_files.py"


def test_the_files_of_the_drivers_are_written_from_their_classes() -> None:
    for path, text in runpy.run_path(str(ROOT / SCRIPT))["driver_files"]().items():
        assert path.read_text() == text, f"run: python {SCRIPT}"


@pytest.mark.parametrize(
    ("schema", "file", "key"),
    [
        (RunConfig, "config.yaml", "run"),
        (DistributedConfig, "config.yaml", "distributed"),
        (EnvConfig, "env/local.yaml", None),
    ],
)
def test_the_sections_of_a_run_have_the_defaults_of_their_classes(schema: type, file: str, key: str | None) -> None:
    written = yaml.safe_load((CONF / file).read_text())
    assert (written[key] if key else written) == dataclasses.asdict(schema())
