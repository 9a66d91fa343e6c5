"""list a run's checkpoints: step, metric, size, verified or not"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from everyrank.errors import EXIT_FAILURE, EXIT_OK, DataError


def main(argv: Sequence[str]) -> int:
    """List the checkpoints of a run's folder; exit code 1 if one of them is damaged."""
    parser = argparse.ArgumentParser(prog="everyrank checkpoints", description=__doc__)
    parser.add_argument("run", help="a run's folder, or its checkpoints folder")
    parser.add_argument("--no-verify", action="store_true", help="do not read the files to verify their checksums")
    arguments = parser.parse_args(argv)
    folder = checkpoint_folder(Path(arguments.run))

    from rich.console import Console
    from rich.table import Table

    from everyrank.checkpoint.folder import list_checkpoints

    infos = list_checkpoints(folder, verify=not arguments.no_verify)
    table = Table("step", "metric", "size", "world size", "written", "verified", title=str(folder))
    for info in infos:
        state = "not checked" if info.verified is None else "yes" if info.verified else f"NO: {info.reason}"
        metric = "" if info.metric is None else f"{info.metric:.6g}"
        written = datetime.fromtimestamp(info.path.stat().st_mtime).isoformat(sep=" ", timespec="seconds")
        size = f"{info.num_bytes / 2**20:.1f} MiB"
        table.add_row(str(info.step), metric, size, str(info.world_size or ""), written, state)
    # Where the output is no terminal, nobody has a narrow one: a reason is not to be cut off.
    Console(width=None if Console().is_terminal else 200).print(table)
    return EXIT_FAILURE if any(info.verified is False for info in infos) else EXIT_OK


def checkpoint_folder(run: Path) -> Path:
    """The folder of checkpoints of a run.

    Raises:
        DataError: There is none.
    """
    for folder in (run / "checkpoints", run):
        if folder.is_dir() and any(folder.glob("step-*")):
            return folder
    raise DataError(f"{run} was given, but there are no checkpoints (step-*) in it or in its checkpoints folder.")
