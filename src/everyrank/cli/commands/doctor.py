"""say what this machine and its environment can do, and what will bite"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from everyrank.errors import EXIT_FAILURE, EXIT_OK, UserError


def main(argv: Sequence[str]) -> int:
    """Examine this machine, or every rank of a cluster; exit code 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="everyrank doctor", description=__doc__)
    parser.add_argument("settings", nargs="*", help="driver=NAME and its settings: look at every rank of such a run")
    parser.add_argument("--json", action="store_true", help="print a list of name, status, found and fix")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="HOST", help="a host that will take part in runs"
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where runs live (default: outputs)")
    arguments = parser.parse_args(argv)
    if arguments.settings:
        return _on_every_rank(arguments)

    from everyrank.doctor.check import as_json, is_well, print_table
    from everyrank.doctor.machine import check_disk, check_machine
    from everyrank.doctor.network import check_collectives, check_network
    from everyrank.doctor.software import check_launchers, check_settings, check_versions

    checks = [
        *check_versions(),
        *check_settings(os.environ),
        *check_machine(os.environ),
        *check_disk(arguments.folder),
        *check_launchers(),
        *check_network(arguments.peer),
        *check_collectives(),
    ]
    if arguments.json:
        print(as_json(checks))
    else:
        print_table(checks)
    return EXIT_OK if is_well(checks) else EXIT_FAILURE


def _on_every_rank(arguments: argparse.Namespace) -> int:
    wrong = [setting for setting in arguments.settings if "=" not in setting]
    if wrong:
        raise UserError(f"{' '.join(wrong)} was given. Fix: write settings as key=value, such as driver=slurm.")
    if arguments.json or arguments.peer:
        raise UserError("--json and --peer look at this machine alone. Fix: leave them out, or leave the settings out.")

    from everyrank.cli.main import run

    return run([*arguments.settings, "app=doctor", f"env.output_dir={arguments.folder}"])
