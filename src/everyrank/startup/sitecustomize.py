"""Run as it starts by every Python program of a run, and by those that it starts: what everyrank gives any program.

Python imports a module of this name from ``PYTHONPATH``; ``launch_env/guard.py`` puts this folder there. The
program need not know of everyrank, and its Python need not have it installed.
"""

import faulthandler
import importlib.machinery
import importlib.util
import os
import signal
import sys
import types

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_HERE)


def _load(name: str, folders: list[str], file: str) -> types.ModuleType | None:
    """Load the module ``file`` as ``name`` from the first of these folders that has it."""
    found = importlib.machinery.PathFinder.find_spec(file, folders)
    if found is None or found.origin is None:
        return None
    inside = found.submodule_search_locations
    spec = importlib.util.spec_from_file_location(name, found.origin, submodule_search_locations=inside)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _cure() -> None:
    """Leave gloo groups without torch's deadlock; a rank has no terminal, and Ctrl-\\ shows where it is."""
    is_rank = "RANK" in os.environ
    for name in ("torch_cures", "no_terminal") if is_rank else ("torch_cures",):
        module = _load(f"everyrank_{name}", [os.path.join(_PACKAGE, "runtime")], name)
        if module is not None:
            module.install()
    if is_rank:
        faulthandler.register(signal.SIGQUIT, all_threads=True)


def _take_part() -> None:
    """Report to the launcher that watches, and rehearse, where the launch asks for it."""
    watched, rehearsed = bool(os.environ.get("EVERYRANK_WATCH")), os.environ.get("EVERYRANK_REHEARSE") == "cpu"
    if not watched and not rehearsed:
        return
    if importlib.util.find_spec("everyrank") is None:
        sys.path.append(os.path.dirname(_PACKAGE))  # a Python it is not installed for
    if rehearsed:
        from everyrank import rehearsal

        rehearsal.install()
    if watched:
        try:
            from everyrank.diagnosis.rank import reporter

            reporter.start()
        except (ImportError, OSError) as error:  # the program runs all the same, unwatched
            print(f"notice: this process does not report to everyrank: {error}", file=sys.stderr)


# There is one sitecustomize to a process, and this file took its name; the program sees the path it would have had.
_at = next((i for i, folder in enumerate(sys.path) if os.path.abspath(folder or os.curdir) == _HERE), None)
if _at is not None:
    del sys.path[_at]
_cure()
_take_part()
if _at is not None:
    _load("sitecustomize", sys.path[_at:], "sitecustomize")
