"""show where the ranks of a live run are now: their Python stacks, equal ones together"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence

from everyrank.diagnosis.proc import look_at
from everyrank.diagnosis.rank_files import ask_for_reports, attempt_dir, newest_attempt, watch_dir
from everyrank.diagnosis.reports import Beat, Report, read_beats, read_reports
from everyrank.errors import EXIT_OK, DataError

_PATIENCE_S = 3.0


def main(argv: Sequence[str]) -> int:
    """Ask every rank of a run for its stack and print them."""
    parser = argparse.ArgumentParser(prog="everyrank stacks", description=__doc__)
    parser.add_argument("run", help="a run's folder")
    run = parser.parse_args(argv).run
    folder = attempt_dir(watch_dir(run), newest_attempt(watch_dir(run)))
    beats = read_beats(folder)
    if not beats:
        raise DataError(
            f"{run} was given, but no rank has reported there. Fix: give the folder that a run with watch.enabled=true "
            "printed."
        )
    asked = ask_for_reports(folder)
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        reports = read_reports(folder)
        if all(rank in reports and (reports[rank].request >= asked or reports[rank].is_gone) for rank in beats):
            break
        time.sleep(0.05)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank in sorted(beats):
        groups[_lines(reports.get(rank), beats[rank], asked)].append(rank)
    for lines, members in groups.items():
        print(f"{'rank' if len(members) == 1 else 'ranks'} {', '.join(str(rank) for rank in members)}:")
        print("\n".join(f"  {line}" for line in lines))
    return EXIT_OK


def _lines(report: Report | None, beat: Beat, asked: int) -> tuple[str, ...]:
    """A rank's stack, outermost first, and what it does."""
    if report is None:  # it began a moment ago
        process = look_at(beat.pid)
        state = "is stopped" if process is not None and process.state in "Tt" else "has not answered yet"
        return (f"{state} (pid {beat.pid}); it was at", beat.where or "its start")
    if report.is_gone:
        return (f"has ended (pid {report.pid})",)
    late = () if report.request >= asked else ("does not answer; what it last said:",)
    if report.is_stopped:
        late = (f"is stopped (pid {report.pid}); what it last said:",)
    return (*late, *reversed(report.stack), report.doing)
