"""The command line of ``main_train_vrt.py``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from everyrank import (
    EveryrankError,
    Preempted,
    UserError,
    join,
    local_rank_argument,
    setup_logging,
    strip_legacy_arguments,
)

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train or test as an option file says.

    The group is joined before the option file is read: from then on the rank is known, and a mistake in the file is
    said once.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a mistake in options or data, 75 if preempted, 130 after Ctrl-C.
    """
    arguments, notices = strip_legacy_arguments(sys.argv[1:] if argv is None else argv)
    if argv is None and local_rank_argument(sys.argv) is not None:
        notices.append("--local-rank is ignored: the launcher's variables tell each process its rank")
        if _local_rank_is_stray():
            sys.argv[1:] = arguments  # where the launch environment is recognised
    parser = argparse.ArgumentParser(description="Train VRT from a JSON option file.")
    parser.add_argument("--opt", required=True, help="the option file, such as options/vrt/demo_bigbuckbunny_x4.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--backend", default="auto", help="auto, gloo or nccl")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="how long a rank waits for the others")
    given = parser.parse_args(arguments)
    rank: int | None = None
    try:
        with join(device=given.device, backend=given.backend, timeout_s=given.timeout_s) as world:
            rank = world.rank
            setup_logging(rank)
            for notice in notices if world.is_main else ():
                logger.info(notice)
            from everyrank.apps.video_restoration.app import run_options  # after the cures that join brings

            result = run_options(given.opt, world)
            if world.is_main:
                print(json.dumps(result), flush=True)
    except (UserError, Preempted) as error:
        # All ranks know of a mistake in options, data or weights; what one rank met in a step has a note.
        if not rank or hasattr(error, "__notes__"):
            print(f"{'error' if isinstance(error, UserError) else 'preempted'}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except EveryrankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _local_rank_is_stray() -> bool:
    """Whether ``--local-rank`` is no launcher's word: an old script has it, with another launcher or with none."""
    said = os.environ.get("LOCAL_RANK")
    return "RANK" not in os.environ if said is None else said != str(local_rank_argument(sys.argv))
