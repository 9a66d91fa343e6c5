"""The way out of an interpreter: what Python does at its end that a program can see, without taking torch apart."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any, NoReturn


def finish(error: BaseException | None) -> NoReturn:
    """Leave the process as the interpreter does at its end, with the code for ``error``; never returns.

    Threads are waited for, functions registered with ``atexit`` run, what ``__main__`` holds is let go, what is in the
    buffers of open files is written. The interpreter itself is not taken down, which takes as long as a start and in
    which C++ threads may abort.
    """
    code = _exit_code(error)
    _carry_out(threading._shutdown, _keep_operators, atexit._run_exitfuncs)  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 1
        except AttributeError:  # closed for good
            continue
    _carry_out(_end_what_is_open)
    os._exit(code)


def finish_after(main: Callable[[], object]) -> NoReturn:
    """Call the main function of a process, and leave with the exit code that it returns or raises."""
    try:
        code = main()
    except BaseException as error:
        finish(error)
    finish(SystemExit(code))


def _carry_out(*steps: Callable[[], object]) -> None:
    for step in steps:
        try:
            step()
        except BaseException:
            traceback.print_exc()


def _keep_operators() -> None:
    """Do not take torch's operators apart, library by library, in a process that ends anyway: 40 ms."""
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        alive = finalizer.peek()
        if alive is not None and alive[1].__module__ == "torch.library":
            finalizer.atexit = False


def _end_what_is_open() -> None:
    """Let what the program's names hold end, and write what it has left in the buffers of files.

    Files end after what may write into them, and in the order in which one writes into the next: text into a compressed
    file, that into a member of an archive, the archive into its file.
    """
    buffered, others = _open_files()
    flush, close = ([_unless_closed(file.flush) for file in buffered], [_unless_closed(file.close) for file in others])
    _carry_out(*flush, _let_go_of_main, _flush_output_of_c, *flush, *close, *flush)


def _open_files() -> tuple[list[Any], list[Any]]:
    """Files that are written by a flush; those that have something to write when they are closed."""
    buffered: list[Any] = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    others: list[Any] = []
    known = {id(stream) for stream in buffered}
    archive: Any = getattr(sys.modules.get("zipfile"), "ZipFile", ())
    kinds: dict[type, bool] = {}
    for one in gc.get_objects():
        kind = type(one)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, (io.IOBase, archive))
        if kinds[kind] and id(one) not in known:
            (buffered if kind.__module__ == "_io" else others).append(one)
    return buffered, sorted(others, key=lambda file: isinstance(file, archive))


def _unless_closed(step: Callable[[], object]) -> Callable[[], None]:
    def carry_out() -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):
            step()

    return carry_out


def _let_go_of_main() -> None:
    """In the interpreter's order. Other threads, which do not live at that time there, stand still or say nothing."""
    sys.setswitchinterval(1e6)
    threading.excepthook = lambda _: None
    names = vars(sys.modules["__main__"])
    public = [name for name in names if not name.startswith("_")]
    for name in [name for name in names if name.startswith("_") and not name.startswith("__")] + public:
        names[name] = None
    gc.collect()


def _flush_output_of_c() -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "stdout"):
        libc.fflush(ctypes.c_void_p.in_dll(libc, "stdout"))


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        with contextlib.suppress(OSError, ValueError):
            print(error.code, file=sys.stderr)
        return 1
    sys.excepthook(type(error), error, error.__traceback__)
    return 1
