"""``driver=ray``: Ray Train places the ranks on a cluster (or on this machine) and starts them again when they fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from everyrank.config.schema import field, section
from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.rank_files import clear_errors
from everyrank.drivers.cluster import RAY, recorded_failures, secrets_of
from everyrank.drivers.driver import Driver, DriverConfig, LaunchPlan, LaunchRequest, python_path
from everyrank.elastic.signals import forwarded
from everyrank.errors import EXIT_BAD_INPUT, DriverError
from everyrank.rendezvous.interfaces import why_unreachable

_RIGHT_ADDRESS = (
    "Set the address that `ray start --head` printed, or auto on a node of the cluster; "
    "leave it out to start a local Ray."
)
_PATIENCE_S = 5.0
_JOINING_S = 30.0  # a cluster takes a node in within a second


@section
class RayConfig(DriverConfig):
    """``driver=ray``: Ray Train."""

    num_workers: int = field(default=2, ge=1, doc="Ranks.")
    address: str | None = field(default=None, doc="Address of a running cluster, or auto; null: start a local one.")
    use_gpu: bool = field(default=False, doc="One GPU for each rank.")
    cpus_per_worker: float = field(default=1.0, gt=0, doc="Cores that Ray sets aside for each rank.")
    max_failures: int = field(default=0, ge=-1, doc="How often Ray starts the ranks again; -1: without end.")


class RayDriver(Driver[RayConfig]):
    """Runs the app as the training loop of a ``TorchTrainer``."""

    name = "ray"
    config_type = RayConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan the trainer."""
        c = self.config
        where = f"the cluster at {c.address}" if c.address else "a local Ray, started for this run"
        return self.planned(
            request,
            (sys.executable, *request.worker),
            c.num_workers,
            summary=(f"workers: {c.num_workers}, by Ray Train on {where}", f"a GPU for each: {c.use_gpu}"),
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Run the trainer to its end.

        Raises:
            DriverError: There is no Ray, or ``driver.address`` is none of a cluster's.
        """
        RAY.require()
        address = self.config.address
        if address is not None:
            _check_address(address)
        clear_errors(request.log_dir)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            # Ray listens on all addresses of a machine that may be part of a cluster. This one is not.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            # By itself Ray lets its workers give way to all other processes of the machine. No other launcher does.
            os.environ.setdefault("RAY_worker_niceness", "0")
        import ray

        # Ray's own folder holds sockets, whose paths must be short, so it is not in the run's.
        folder = None if address else tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        variables = {**plan.env, **secrets_of(plan.env), **python_path(request)}
        try:
            self._connect(ray, variables, folder)
            with forwarded(_interrupt, lambda: _interrupt(signal.SIGINT)) as told:
                try:
                    return self._fit(plan, request)
                except KeyboardInterrupt:
                    return Outcome(signum=told.signum, world_size=self.config.num_workers)
        finally:
            ray.shutdown()
            if folder is not None:
                _remove(folder)

    def _fit(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from everyrank.drivers.ray_backend import MeetByVariables

        c = self.config
        resources = {"CPU": c.cpus_per_worker, **({"GPU": 1.0} if c.use_gpu else {})}
        trainer: Any = TorchTrainer(
            _train,
            train_loop_config={
                "config_file": request.config_file,
                "cwd": request.cwd,
                "command": list(plan.command) if request.program is not None else None,
            },
            torch_config=MeetByVariables(),
            scaling_config=ScalingConfig(num_workers=c.num_workers, use_gpu=c.use_gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name="ray", storage_path=request.run_dir, failure_config=FailureConfig(max_failures=c.max_failures)
            ),
        )
        # Its own way to take Ctrl-C waits until all ranks have started, and does not come back to us.
        trainer._register_sigint_handler = lambda controller: None
        try:
            trainer.fit()
        except Exception as error:
            failures = recorded_failures(request.log_dir)
            message = "" if failures else f"error: Ray Train: {error}"
            return Outcome(failures=failures, message=message, world_size=c.num_workers)
        return Outcome(world_size=c.num_workers)

    def _connect(self, ray: Any, variables: dict[str, str], folder: str | None) -> None:
        c = self.config
        runtime_env = {"env_vars": variables}
        try:
            if c.address:
                with _in_time(c.address):
                    ray.init(address=c.address, runtime_env=runtime_env)
            else:
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says
                    num_cpus=max(int(c.num_workers * c.cpus_per_worker + 1), 2),
                    include_dashboard=False,
                    runtime_env=runtime_env,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=folder,
                )
        except Exception as error:  # Ray raises no class of its own, where its processes take too long to start
            if c.address is None:
                raise DriverError(f"a local Ray could not be started: {error}") from error
            raise DriverError(
                f"driver.address={c.address} was set, but no Ray cluster that takes this machine in answers there: "
                f"{error}. {_RIGHT_ADDRESS} If the cluster asks for a token (what Ray wrote above says so), also set "
                "RAY_AUTH_MODE=token."
            ) from error


def _interrupt(signum: int) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


@contextlib.contextmanager
def _in_time(address: str) -> Iterator[None]:
    """End the process where Ray would wait without end: for another program that listens at the address.

    Ray waits in C++, where no exception and no signal reaches it; nothing has been started that would be left.
    """

    def give_up() -> None:
        print(
            f"error: driver.address={address} was set, but whatever listens there has not answered as Ray does for "
            f"{_JOINING_S:g} s. {_RIGHT_ADDRESS}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_BAD_INPUT)

    timer = threading.Timer(_JOINING_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _remove(folder: str) -> None:
    """Remove Ray's folder; its last processes may still write to it for a moment."""
    deadline = time.monotonic() + _PATIENCE_S
    while os.path.exists(folder) and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _check_address(address: str) -> None:
    """Refuse what Ray would wait minutes for, or not run on.

    Raises:
        DriverError: The address is not ``auto`` or ``HOST:PORT``, or nothing answers there.
    """
    if address == "auto":
        return  # Ray looks it up, at once
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise DriverError(f"driver.address={address} was set; it is auto or HOST:PORT. {_RIGHT_ADDRESS}")
    reason = why_unreachable(host.strip("[]"), int(port), _PATIENCE_S)
    if reason:
        raise DriverError(
            f"driver.address={address} was set, but no Ray cluster answers there ({reason}). {_RIGHT_ADDRESS}"
        )


def _train(loop: dict[str, Any]) -> None:
    """What one Ray worker runs: this rank."""
    os.chdir(loop["cwd"])
    if loop["command"] is not None:
        code = subprocess.run(loop["command"], check=False).returncode
    else:
        from importlib import import_module

        try:
            import_module("everyrank.worker").run_rank(loop["config_file"])
            code = 0
        except SystemExit as exit_:  # it would end Ray's own process
            code = int(exit_.code or 0)
    if code:
        raise RuntimeError(f"rank {os.environ.get('RANK')} ended with exit code {code}")
