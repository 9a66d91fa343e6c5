"""``everyrank doctor driver=...``: the doctor on every rank of a run, and where the ranks differ."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from everyrank.doctor.check import Check, is_well, may_bite, print_table
from everyrank.doctor.machine import check_disk, check_machine
from everyrank.doctor.software import check_settings, check_versions
from everyrank.errors import EveryrankError
from everyrank.runtime.collectives import barrier, gather_objects
from everyrank.runtime.process_group import join

if TYPE_CHECKING:
    from omegaconf import DictConfig

_MOST_SKEW_S = 1.0


class Doctor:
    """Looks at every rank's machine; joining has already tried the way between them."""

    def run(self, cfg: DictConfig) -> None:
        """Print one table for all ranks.

        Raises:
            EveryrankError: Something is wrong.
        """
        with join(**cfg.distributed) as world:
            barrier()
            now_s = time.time()
            place = f"rank {world.rank} on {os.uname().nodename}"
            own = [
                *check_versions(),
                *check_settings({}),
                *check_machine(os.environ),
                *check_disk(Path(cfg.env.output_dir)),
            ]
            reports = gather_objects((place, now_s, own))
            if not world.is_main:
                return
            checks = [*merge([(place, checks) for place, _, checks in reports]), _skew([at for _, at, _ in reports])]
            print_table(checks)
            if not is_well(checks):
                raise EveryrankError("something is wrong: see the table above")


def merge(reports: list[tuple[str, list[Check]]]) -> list[Check]:
    """Return one check for each name: where ranks differ, what each of them found.

    Args:
        reports: A rank's name and its checks, for each rank.
    """
    names = list(dict.fromkeys(check.name for _, checks in reports for check in checks))
    merged = []
    for name in names:
        found = [(place, check) for place, checks in reports for check in checks if check.name == name]
        worst = max((check for _, check in found), key=lambda check: ("ok", "warn", "wrong").index(check.status))
        texts: dict[str, list[str]] = {}
        for place, check in found:
            texts.setdefault(check.found, []).append(place)
        if len(texts) == 1 and len(found) == len(reports):
            merged.append(worst)
            continue
        lines = "\n".join(f"{', '.join(places)}: {text}" for text, places in texts.items())
        status = "warn" if worst.status == "ok" and name in _ALIKE else worst.status
        merged.append(Check(name, status, lines, worst.fix or (_ALIKE.get(name, ""))))
    return merged


# What must be the same on every rank, and what to do where it is not.
_ALIKE = {
    "Python": "use one environment on every node",
    "torch": "install one version of torch on every node",
    "everyrank": "install one version of everyrank on every node",
    "CUDA": "use nodes of one kind, or expect the pace of the slowest",
}


def _skew(times_s: list[float]) -> Check:
    """Compare the clocks, read right after a barrier."""
    skew_s = max(times_s) - min(times_s)
    fix = "set the clocks (chrony, ntp): logs and locks of the nodes cannot be compared"
    return may_bite("clocks", f"{skew_s:.2f} s apart", skew_s > _MOST_SKEW_S, fix)
