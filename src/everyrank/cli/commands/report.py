"""make one self-contained HTML page of a run: configuration, curves, checkpoints, logs"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from everyrank.errors import EXIT_OK, DataError


def main(argv: Sequence[str]) -> int:
    """Write the report of a run's folder and say where it is."""
    parser = argparse.ArgumentParser(prog="everyrank report", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, help="the file to write; default: RUN/report.html")
    parser.add_argument("--log-lines", type=int, default=40, help="last lines of each rank's log (default 40)")
    arguments = parser.parse_args(argv)
    if arguments.log_lines < 0:
        raise DataError(f"--log-lines={arguments.log_lines} was given; it is 0 or more.")

    from everyrank.reporting.page import render
    from everyrank.reporting.run_facts import read_run

    page = render(read_run(arguments.run, arguments.log_lines))
    out = arguments.out or arguments.run / "report.html"
    try:
        out.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"--out={out} was given, but it cannot be written: {error.strerror}.") from error
    print(f"wrote {out}")
    return EXIT_OK
