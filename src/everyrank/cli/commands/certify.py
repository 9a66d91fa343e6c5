"""prove it here: kills, resizes and every launcher found, each sample exactly once, equal weights"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from everyrank.errors import EXIT_FAILURE, EXIT_OK, EveryrankError, UserError

if TYPE_CHECKING:
    from everyrank.certification.evidence import Evidence
    from everyrank.certification.launchers import Launcher
    from everyrank.certification.trial import Trial

# Gradients summed over ranks differ from one process's in the last bits (float64).
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Verdict:
    """One line of the certificate."""

    launcher: str
    world_sizes: str
    faults: str
    exactly_once: bool
    weights: str
    holds: bool


def main(argv: Sequence[str]) -> int:
    """Run the trials and print the certificate; exit code 0 only if every line holds."""
    parser = argparse.ArgumentParser(
        prog="everyrank certify",
        description="Train a small app under kills, resizes and every launcher found on this machine, and compare what "
        "each run left with one uninterrupted process. The app must be a TrainerDDP app that trains in float64 with "
        "training.ledger: true, such as app=certify (the default).",
    )
    parser.add_argument("overrides", nargs="*", default=[], help="app=NAME and settings, as for everyrank run")
    parser.add_argument("--seed", type=int, default=0, help="which steps and ranks are hit")
    parser.add_argument("--quick", action="store_true", help="fewer kinds, under the torchrun driver only")
    parser.add_argument(
        "--launchers",
        metavar="NAME,...",
        help="only these, without kills and resizes: names of the certificate's first column, such as srun,mpirun",
    )
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    arguments = parser.parse_args(argv)
    overrides = list(arguments.overrides)
    if any("=" not in override for override in overrides):
        raise UserError(f"{' '.join(overrides)} was given; write settings as key=value, such as app=certify.")
    if not any(override.startswith("app=") for override in overrides):
        overrides.insert(0, "app=certify")
    trials, missing = _trials(arguments.launchers, arguments.quick, is_own="app=certify" in overrides)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="everyrank-certify-"))
    try:
        verdicts = _certify(folder, overrides, arguments.seed, trials)
    except EveryrankError as error:
        print(f"error: no certificate: {error}", file=sys.stderr)
        return EXIT_FAILURE
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    _print(verdicts, missing)
    return EXIT_OK if all(verdict.holds for verdict in verdicts) else EXIT_FAILURE


def _trials(names: str | None, quick: bool, *, is_own: bool) -> tuple[list[Trial], list[str]]:
    """What is to be run, and for each launcher that this machine lacks a line that says why.

    ``is_own``: it is the certificate's own app, whose keys are known and can be set.

    Raises:
        UserError: A launcher is asked for by a name that is unknown, or is not on this machine.
    """
    from everyrank.certification.launchers import choose_launchers, find_launchers
    from everyrank.certification.trial import Trial

    found, missing = find_launchers()
    if names is not None:
        return [Trial(launcher, (2,)) for launcher in choose_launchers(names.split(","), found, missing)], []
    torchrun = found[0]

    def named(what: str) -> Launcher:
        return replace(torchrun, name=f"{torchrun.name}, {what}")

    kill = ("SIGKILL rank", 1)
    trials = [
        *(Trial(launcher, (2,)) for launcher in (found[:1] if quick else found)),
        Trial(torchrun, (2,), "SIGKILL rank", 2),
        Trial(torchrun, (2,), "SIGTERM launcher", 1),
        Trial(named("moved"), (2,), *kill, moves=True),
        Trial(torchrun, (2, 1, 3, 2), "SIGKILL rank", 3),
    ]
    if not quick:
        trials += [
            Trial(torchrun, (2,), "SIGKILL launcher", 1),
            Trial(torchrun, (2,), "SIGTERM rank", 1),
            Trial(named("restarts"), (2,), *kill, ("driver.max_restarts=1",)),
        ]
    if is_own:
        trials += [
            Trial(named("fsdp2"), (2,), *kill, ("+app.parallel.strategy=fsdp2",)),
            Trial(named("workers"), (2,), *kill, ("+app.training.num_workers=2",)),
        ]
    return trials, missing


def _certify(folder: Path, overrides: list[str], seed: int, trials: Sequence[Trial]) -> list[Verdict]:
    from everyrank.certification.evidence import Evidence
    from everyrank.certification.launchers import plain_python
    from everyrank.certification.trial import Trial, carry_out

    chance = random.Random(seed)
    overrides = [*overrides, f"env.data_dir={folder}/data"]
    alone = Trial(plain_python(), (1,))
    reference = Evidence.of(carry_out(alone, folder / "reference", overrides, chance)[0])
    verdicts = [Verdict("python", "1", "-", reference.exactly_once(reference), "reference", True)]
    verdicts[0] = replace(verdicts[0], holds=verdicts[0].exactly_once)
    two: Evidence | None = None
    for number, trial in enumerate(trials):
        print(f"{trial.launcher.name}, world size {trial.title}, {trial.faults(trial.num_faults)} ...", flush=True)
        try:
            run, num_delivered = carry_out(trial, folder / f"trial-{number}", overrides, chance)
            evidence = Evidence.of(run)
        except EveryrankError as error:
            print(error, file=sys.stderr)
            verdicts.append(Verdict(trial.launcher.name, trial.title, trial.fault, False, "the run failed", False))
            continue
        verdicts.append(_judge(trial, num_delivered, evidence, reference, two))
        if two is None and trial.world_sizes == (2,):
            two = evidence
    return verdicts


def _judge(
    trial: Trial, num_delivered: int, evidence: Evidence, reference: Evidence, same_size: Evidence | None
) -> Verdict:
    """At an unchanged world size the weights must be bitwise equal to an earlier run's, else equal to rounding.

    What was not done is not certified: kills that were not delivered, world sizes at which no step was committed.
    """
    once = evidence.exactly_once(reference)
    from_one = evidence.difference(reference)
    fixed_size = len(set(trial.world_sizes)) == 1
    bitwise = same_size is not None and evidence.difference(same_size) == 0
    weights = f"{from_one:.0e} to python"
    if fixed_size and bitwise:
        weights = f"bitwise; {weights}"
    elif fixed_size and same_size is None:
        weights = f"reference; {weights}"
    done = num_delivered == trial.num_faults and evidence.world_sizes == trial.world_sizes
    equal = from_one <= _TOLERANCE and (bitwise or not fixed_size or same_size is None)
    sizes = " → ".join(map(str, evidence.world_sizes))
    return Verdict(trial.launcher.name, sizes, trial.faults(num_delivered), once, weights, done and once and equal)


def _print(verdicts: Sequence[Verdict], missing: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("launcher", "world sizes", "kills", "exactly once", "weights", "holds")
    for v in verdicts:
        once = "yes" if v.exactly_once else "NO"
        table.add_row(v.launcher, v.world_sizes, v.faults, once, v.weights, "yes" if v.holds else "NO")
    Console(width=124).print(table)
    print(
        "exactly once: each sample of each epoch, by the ledger of committed steps. weights: those of the newest "
        "checkpoint,\nand their moving average where the app keeps one; bitwise: equal to the first run of two ranks."
    )
    for line in missing:
        print(f"not on this machine: {line}")
