"""Which rank is to blame, and how a person is told.

The first process to exit is often innocent: it waited in a collective for a rank that raised, and lost its connection.
So every rank records the exception that ended it, and the records are compared.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.errors import RankFailedError, UserError

# What gloo, NCCL and the stores say when the other side is gone or does not come.
_PEER_TROUBLE = re.compile(
    r"connection (closed|reset|refused|was (forcibly )?closed)|broken pipe|read timeout|timed out waiting|"
    r"socket closed|no longer connected|remote process exited|\[.*gloo/transport|ncclremoteerror|watchdog|"
    r"failed to (connect|recv|send)|peer",
    re.IGNORECASE,
)


def record_error(error: BaseException, rank: int, exit_code: int, *paths: str | None) -> dict[str, Any]:
    """Write the exception that ends this rank where the launcher looks for it.

    The file has the form that ``torchrun`` reads (``TORCHELASTIC_ERROR_FILE``), with our keys beside it.

    Args:
        error: The exception.
        rank: This process's global rank.
        exit_code: The code this process will exit with.
        paths: The files to write; None is passed over.
    """
    text = "".join(traceback.format_exception(error))
    now_s = time.time()
    record = {
        "message": {
            "message": f"{type(error).__name__}: {error}",
            "extraInfo": {"py_callstack": text, "timestamp": str(int(now_s))},
        },
        "rank": rank,
        "exit_code": exit_code,
        "type": type(error).__name__,
        "text": str(error),
        "notes": list(getattr(error, "__notes__", [])),
        "traceback": text,
        "time_s": now_s,
        "user_error": isinstance(error, UserError),
        "peer_trouble": not isinstance(error, UserError) and _is_peer_trouble(error),
    }
    for path in filter(None, dict.fromkeys(paths)):
        partial = f"{path}.{os.getpid()}.part"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(record, file)
        os.replace(partial, path)
    return record


def _is_peer_trouble(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"DistNetworkError", "DistStoreError", "BarrierTimeoutError"}:
        return True
    return "RuntimeError" in names and bool(_PEER_TROUBLE.search(str(error)))


def guilty(failures: Sequence[RankFailure]) -> RankFailure | None:
    """The failure that explains the others.

    In this order: an exception of a rank's own; a death by a signal that nobody of ours sent; an exit without a word;
    an exception about a peer; a rank that we ended. Among equals, the earliest.
    """

    def order(failure: RankFailure) -> tuple[int, float, int]:
        error = failure.error
        time_s = float(error["time_s"]) if error else 0.0
        if error and not error.get("peer_trouble"):
            blame = 0
        elif failure.exit_code < 0 and not failure.ended_by_us:
            blame = 1
        elif error is None and not failure.ended_by_us:
            blame = 2
        elif error:
            blame = 3
        else:
            blame = 4
        return (blame, time_s, failure.rank)

    return min(failures, key=order, default=None)


def error_of(outcome: Outcome) -> RankFailedError | None:
    """The outcome as an exception that names the guilty rank, or None if no rank failed."""
    failure = guilty(outcome.failures)
    if failure is None:
        return None
    return RankFailedError(
        describe(outcome),
        rank=failure.rank,
        traceback=str(failure.error["traceback"]) if failure.error else "",
        log_file=failure.log_file,
        exit_code=failure.exit_code,
    )


def describe(outcome: Outcome) -> str:
    """What a person reads last: the guilty rank, its traceback, its log, and how the others ended."""
    failure = guilty(outcome.failures)
    if failure is None:
        return outcome.message
    if failure.error and failure.error.get("user_error"):
        return f"error: {failure.error['text']}"
    size = f" of {outcome.world_size}" if outcome.world_size else ""
    lines = []
    if failure.error:
        lines += [str(failure.error["traceback"]).rstrip(), ""]
    lines.append(f"error: rank {failure.rank}{size} failed: {_cause(failure)}")
    if failure.log_file:
        lines.append(f"  its log: {failure.log_file}")
    others = [f for f in outcome.failures if f.rank != failure.rank]
    lines += [f"  rank {other.rank} ended after it: {_cause(other)}" for other in others[:8]]
    if len(others) > 8:
        lines.append(f"  and {len(others) - 8} more ranks")
    if outcome.num_restarts:
        lines.append(f"  the group had been started again {outcome.num_restarts} times")
    return "\n".join(lines)


def _cause(failure: RankFailure) -> str:
    if failure.ended_by_us:
        return "ended by the launcher"
    if failure.error:
        first_line = str(failure.error["text"]).split("\n", 1)[0]
        return f"{failure.error['type']}: {first_line}"
    if failure.exit_code < 0:
        name = signal.Signals(-failure.exit_code).name
        hint = " (out of memory? the kernel's log, dmesg, would say so)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exit code {failure.exit_code}"


def render(record: Mapping[str, Any]) -> str:
    """A rank's own record as text, for a launcher that is not ours."""
    if record["user_error"]:
        return f"error: {record['text']}"
    return str(record["traceback"]).rstrip()
