"""Run by every Python of a watched run as it starts: see everyrank.diagnosis.rank.reporter."""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _report() -> None:
    if not os.environ.get("EVERYRANK_WATCH"):
        return
    if importlib.util.find_spec("everyrank") is None:
        sys.path.append(os.path.abspath(os.path.join(_HERE, *[os.pardir] * 4)))  # a Python it is not installed for
    try:
        from everyrank.diagnosis.rank import reporter

        reporter.start()
    except (ImportError, OSError) as error:  # the program runs all the same, unwatched
        print(f"notice: this process does not report to everyrank: {error}", file=sys.stderr)


def _run_the_other_sitecustomize() -> None:
    """There is one ``sitecustomize`` to a process, and this file took its name."""
    here = [os.path.abspath(folder or os.curdir) for folder in sys.path]
    rest = sys.path[here.index(_HERE) + 1 :] if _HERE in here else []
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_report()
_run_the_other_sitecustomize()
