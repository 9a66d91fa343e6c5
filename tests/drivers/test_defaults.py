"""A default is written once: the group files say what the classes say."""

from __future__ import annotations

import dataclasses
import runpy

import pytest
import yaml

from conftest import ROOT
from everyrank.cli.run_config import DistributedConfig, EnvConfig, RunConfig

CONF = ROOT / "src" / "everyrank" / "conf"
SCRIPT = "scripts/write_reference.py"


def test_what_is_written_from_the_schemas_is_what_they_say() -> None:
    """The files of the drivers, and the reference pages: the trainer's, the linter's, video restoration's."""
    files = runpy.run_path(str(ROOT / SCRIPT))["written"]()
    assert {"torchrun.yaml", "configuration.md", "video_restoration_options.md", "rules.md"} <= {
        path.name for path in files
    }
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, f"run: python {SCRIPT}"


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
