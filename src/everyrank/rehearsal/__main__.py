"""``python -m everyrank.rehearsal [-n N] -- COMMAND ...``: run any command as a rehearsal, under any launcher."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from everyrank.errors import EXIT_BAD_INPUT
from everyrank.rehearsal import DEVICES, environment


def main(argv: Sequence[str] | None = None) -> int:
    """Replace this process by the command, with the variables of a rehearsal."""
    parser = argparse.ArgumentParser(
        prog="python -m everyrank.rehearsal",
        description="Run a command whose Python programs were written for CUDA and NCCL on the CPU, unchanged.",
        epilog="example: python -m everyrank.rehearsal -- torchrun --nproc-per-node=2 train.py",
    )
    parser.add_argument("-n", "--devices", type=int, help="CUDA devices to show where no launcher says it (default: 1)")
    parser.add_argument("command", nargs="+", help="the command, after --")
    arguments = parser.parse_args(argv)
    if arguments.devices is not None:
        if arguments.devices < 1:
            parser.error(f"--devices={arguments.devices} was set. Fix: a number of devices, at least 1.")
        os.environ[DEVICES] = str(arguments.devices)
    os.environ.update(environment(1))
    sys.stdout.flush()  # what a sitecustomize of the user's has printed: no exit of this program will do it
    try:
        os.execvp(arguments.command[0], arguments.command)
    except OSError as error:
        print(f"error: {arguments.command[0]} cannot be run: {error.strerror}.", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
