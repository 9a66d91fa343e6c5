"""How a person's own script ends when it cannot join: with the message, as under our own entries."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import TracebackType

from everyrank.errors import UserError


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Let a UserError that nobody catches end the program with its message alone and its exit code, 2.

    A launcher shows the output of every rank: eight tracebacks through torch would bury the one sentence that matters.
    A hook of the user's own, and an interactive Python, stay as they are.
    """
    try:
        yield
    except UserError:
        if sys.excepthook is sys.__excepthook__ and not hasattr(sys, "ps1"):
            sys.excepthook = _say
        raise


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, UserError):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code)
