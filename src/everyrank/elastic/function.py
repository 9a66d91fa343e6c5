"""``everyrank.launch``: run a function on several ranks and get each rank's result, from Python or a notebook."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from everyrank import modules_in_use
from everyrank.diagnosis.judge import conclude
from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.telling import as_error
from everyrank.diagnosis.watch_config import WatchConfig, watch_variables
from everyrank.diagnosis.watcher import Watcher
from everyrank.elastic import engine_pool
from everyrank.elastic.machine import resolve_nproc, resolve_start_method
from everyrank.elastic.process.torch_bound import check_torch
from everyrank.elastic.spec import EngineRun
from everyrank.errors import EXIT_OK, EveryrankError, UserError

P = ParamSpec("P")
T = TypeVar("T")


def launch(
    fn: Callable[..., T],
    *args: Any,
    nproc_per_node: int | str = 2,
    start_method: str = "forkserver",
    max_restarts: int = 0,
    master_port: int = 0,
    env: Mapping[str, str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preload: Sequence[str] = (),
    watch: bool = True,
) -> list[T]:
    """Call ``fn(*args, **kwargs)`` on every rank and return the results, ordered by rank.

    The ranks have the variables that torchrun sets (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` ...), so
    ``everyrank.join()`` or ``torch.distributed.init_process_group()`` work in ``fn``. The first call starts an engine
    process that imports torch once; later calls fork their ranks from it in a fraction of a second. The function is
    pickled by value if it lives in a script or a notebook, so no ``if __name__ == "__main__"`` is needed.

    Args:
        fn: Any picklable callable (by cloudpickle: lambdas and closures too).
        args: Its positional arguments.
        nproc_per_node: Number of ranks, or ``"auto"``, ``"gpu"``, ``"cpu"``.
        start_method: ``"forkserver"`` (one import of torch), ``"spawn"`` or ``"fork"``.
        max_restarts: How often the whole group is started again after a failure.
        master_port: A port for the ranks' store; 0 finds a free one.
        env: More environment variables for the ranks.
        kwargs: Its keyword arguments.
        preload: Modules to import once, before ranks are forked (``forkserver``): ranks then start with them. So
            they do with what of everyrank the caller has imported.
        watch: Watch the ranks, as ``watch.enabled`` of the command line: who keeps the others waiting is then named.

    Returns:
        One result for each rank.

    Raises:
        RankFailedError: A rank raised or died; it names the rank and carries its original traceback, and its
            ``__cause__`` is the rank's exception where that can be pickled. The other ranks are ended. Also where ranks
            took part in one collective with different things and nobody noticed: the results are wrong then.
        UserError: A wrong argument; nothing was started.
    """
    import cloudpickle

    check_torch()
    settings: dict[str, Any] = {
        "nproc_per_node": resolve_nproc(nproc_per_node, "nproc_per_node"),
        "start_method": resolve_start_method(start_method, "start_method"),
        "max_restarts": max_restarts,
        "master_port": master_port,
        "preload": (*preload, *sorted(modules_in_use())),
    }
    with tempfile.TemporaryDirectory(prefix="everyrank-launch-", ignore_cleanup_errors=True) as folder:
        with open(os.path.join(folder, "function"), "wb") as file:
            cloudpickle.dump((fn, args, dict(kwargs or {})), file)
        return _run(folder, env or {}, watch, settings)


def _run(folder: str, env: Mapping[str, str], watch: bool, settings: dict[str, Any]) -> list[Any]:
    run = EngineRun(
        entry="everyrank.elastic.rank_function:call",
        args=(folder,),
        log_dir=os.path.join(folder, "logs"),
        cwd=os.getcwd(),
        sys_path=tuple(os.path.abspath(p) if p == "" else p for p in sys.path),
        base_env=dict(os.environ),
        env={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **env,
            **watch_variables(folder, watch, {**os.environ, **env}),
        },
        monitor_interval_s=0.02,
        shutdown_timeout_s=5.0,
        failure_grace_s=0.3,
        **settings,
    )
    with Watcher(folder, WatchConfig(enabled=watch), run.nproc_per_node) as watcher:
        outcome = engine_pool.run(run)
    _raise_for(outcome, folder, watcher.num_oom_kills)
    if (mismatch := watcher.silent_mismatch()) is not None:
        raise as_error(mismatch, run.nproc_per_node)
    return [_read(os.path.join(folder, f"result-{rank}")) for rank in range(run.nproc_per_node)]


def _raise_for(outcome: Outcome, folder: str, num_oom_kills: int) -> None:
    if outcome.exit_code == EXIT_OK:
        return
    if outcome.message:
        raise UserError(outcome.message) if outcome.user_error else EveryrankError(outcome.message)
    if outcome.signum == signal.SIGINT:
        raise KeyboardInterrupt
    if outcome.signum is not None and all(failure.ended_by_us for failure in outcome.failures):
        raise EveryrankError(f"the ranks were ended by {signal.Signals(outcome.signum).name}")
    verdict = conclude(folder, outcome.failures, world_size=outcome.world_size, num_oom_kills=num_oom_kills)
    if verdict is not None:
        raise as_error(verdict, outcome.world_size) from _cause(os.path.join(folder, f"exception-{verdict.rank}"))


def _cause(path: str) -> BaseException | None:
    try:
        return _read(path)
    except (OSError, pickle.UnpicklingError, AttributeError, ImportError, TypeError):
        return None


def _read(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file)
