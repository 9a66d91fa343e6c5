"""Nobody sits at a rank's terminal: ``input()`` and ``breakpoint()`` say so at once, and how to debug one rank.

A rank that read the terminal from the background would be stopped by the kernel, and the whole run with it. So ranks
read from the null device. This file needs nothing of everyrank, see ``torch_cures``.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


def install() -> None:
    """Say what to do instead, in this process, where something asks for the terminal."""
    if sys.stdin is not None and sys.stdin.isatty():
        return
    import builtins

    def input(prompt: object = "", /) -> str:
        print(prompt, end="", flush=True)
        line = sys.stdin.readline() if sys.stdin else ""
        return line.removesuffix("\n") if line else _refuse("input()")

    builtins.input = input
    if not os.environ.get("PYTHONBREAKPOINT"):  # else the user chose a debugger, such as one that listens on a port
        sys.breakpointhook = _no_breakpoint


def detach() -> None:
    """Read from the null device from now on."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _no_breakpoint(*_: Any, **__: Any) -> NoReturn:
    _refuse("breakpoint()")


def _refuse(what: str) -> NoReturn:
    rank = os.environ.get("RANK", "?")
    message = (
        f"{what} was called on rank {rank}, but a rank has no terminal to read from. Fix: debug the program as one "
        "process (driver=local, or plain python), or set PYTHONBREAKPOINT to a debugger that listens on a port, or "
        f"look at the running rank: py-spy dump --pid {os.getpid()}"
    )
    print(f"error: {message}", file=sys.stderr, flush=True)  # pdb turns an end of input into its own exception
    raise EOFError(message)
