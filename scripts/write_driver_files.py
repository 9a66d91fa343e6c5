"""Write src/everyrank/conf/driver/*.yaml from the drivers' configuration classes."""

from __future__ import annotations

from pathlib import Path

import yaml

from everyrank.config.reference import group_file
from everyrank.config.resolve import import_object

FOLDER = Path(__file__).resolve().parent.parent / "src" / "everyrank" / "conf" / "driver"


def driver_files() -> dict[Path, str]:
    """Path and content of every driver's file."""
    targets = {path: yaml.safe_load(path.read_text())["_target_"] for path in sorted(FOLDER.glob("*.yaml"))}
    return {path: group_file(import_object(target).config_type, target=target) for path, target in targets.items()}


if __name__ == "__main__":
    for path, text in driver_files().items():
        path.write_text(text)
        print(path)
