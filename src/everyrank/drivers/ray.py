"""``driver=ray``: Ray places the ranks on a cluster, or on this machine; where they fail they are started again."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from everyrank.config.schema import field, section
from everyrank.diagnosis.judge import conclude
from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.rank_files import clear_errors
from everyrank.diagnosis.telling import tell_restart
from everyrank.drivers.cluster import RAY, recorded_failures, secrets_of
from everyrank.drivers.driver import Driver, DriverConfig, LaunchPlan, LaunchRequest, python_path
from everyrank.elastic.signals import forwarded
from everyrank.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_PREEMPTED, DriverError
from everyrank.rendezvous.interfaces import why_unreachable

_RIGHT_ADDRESS = (
    "Set the address that `ray start --head` printed, or auto on a node of the cluster; "
    "leave it out to start a local Ray."
)
_PATIENCE_S = 5.0
_GRACE_S = 1.0  # for the other ranks to end by themselves after one failed
_JOINING_S = 30.0  # a cluster takes a node in within a second


@section
class RayConfig(DriverConfig):
    """``driver=ray``: ranks on a Ray cluster."""

    num_workers: int = field(default=2, ge=1, doc="Ranks.")
    address: str | None = field(default=None, doc="Address of a running cluster, or auto; null: start a local one.")
    use_gpu: bool = field(default=False, doc="One GPU for each rank.")
    cpus_per_worker: float = field(default=1.0, gt=0, doc="Cores that Ray sets aside for each rank.")
    max_failures: int = field(default=0, ge=-1, doc="How often all ranks are started again; -1: without end.")


class RayDriver(Driver[RayConfig]):
    """Has Ray place one actor for each rank."""

    name = "ray"
    config_type = RayConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan the ranks."""
        c = self.config
        where = f"the cluster at {c.address}" if c.address else "a local Ray, started for this run"
        return self.planned(
            request,
            (sys.executable, *request.worker),
            c.num_workers,
            summary=(f"workers: {c.num_workers}, by Ray on {where}", f"a GPU for each: {c.use_gpu}"),
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Run the ranks to their end.

        Raises:
            DriverError: There is no Ray, ``driver.address`` is none of a cluster's, or this machine has too few GPUs.
        """
        RAY.require()
        address = self.config.address
        if address is not None:
            _check_address(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            # Ray listens on all addresses of a machine that may be part of a cluster. This one is not.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            # By itself Ray lets its workers give way to all other processes of the machine. No other launcher does.
            os.environ.setdefault("RAY_worker_niceness", "0")
        import ray

        # Ray's own folder holds sockets, whose paths must be short, so it is not in the run's.
        folder = None if address else tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        try:
            self._connect(ray, folder)
            return self._attempts(plan, request)
        finally:
            ray.shutdown()
            if folder is not None:
                _remove(folder)

    def _attempts(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        variables = {**plan.env, **secrets_of(plan.env), **python_path(request)}
        for attempt in itertools.count():
            clear_errors(request.log_dir)
            variables["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
            outcome = self._attempt(plan, request, variables)
            is_final = outcome.signum is not None or outcome.exit_code in (EXIT_OK, EXIT_BAD_INPUT, EXIT_PREEMPTED)
            if is_final or attempt == self.config.max_failures:
                break
            if outcome.message:
                print(outcome.message, file=sys.stderr, flush=True)
            size = outcome.world_size
            tell_restart(conclude(request.run_dir, outcome.failures, world_size=size, attempt=attempt), attempt)
        return replace(outcome, num_restarts=attempt)

    def _attempt(self, plan: LaunchPlan, request: LaunchRequest, variables: Mapping[str, str]) -> Outcome:
        from everyrank.drivers.ray_ranks import Gang

        c = self.config
        resources = {"CPU": c.cpus_per_worker, **({"GPU": 1.0} if c.use_gpu else {})}
        gang = Gang(c.num_workers, resources, self._waits, _PATIENCE_S)
        try:
            with forwarded(gang.signal, gang.close) as told:
                ended = gang.run(plan.command[1:], request.cwd, variables, _GRACE_S)
        finally:
            gang.close()
        failures = recorded_failures(request.log_dir, ended.codes)
        message = ""
        if ended.lost and not failures:
            rank, said = min(ended.lost.items())
            message = f"error: Ray could not run rank {rank} of {c.num_workers}: {said}"
        return Outcome(
            failures=failures,
            signum=told.signum,
            message=message,
            world_size=c.num_workers,
        )

    def _waits(self, there: Mapping[str, float]) -> None:
        c = self.config
        found = ", ".join(f"{name} {there.get(name, 0):g}" for name in ("CPU", "GPU"))
        wanted = f"{c.num_workers} times {c.cpus_per_worker:g} CPU{' and a GPU' if c.use_gpu else ''}"
        print(f"notice: waiting for {wanted}; there is {found} in all", file=sys.stderr, flush=True)

    def _connect(self, ray: Any, folder: str | None) -> None:
        c = self.config
        try:
            if c.address:
                with _in_time(c.address):
                    ray.init(address=c.address)
            else:
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says
                    num_cpus=math.ceil(c.num_workers * c.cpus_per_worker),
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=folder,
                )
                num_gpus = int(ray.cluster_resources().get("GPU", 0))
        except Exception as error:  # Ray raises no class of its own, where its processes take too long to start
            if c.address is None:
                raise DriverError(f"a local Ray could not be started: {error}") from error
            raise DriverError(
                f"driver.address={c.address} was set, but no Ray cluster that takes this machine in answers there: "
                f"{error}. {_RIGHT_ADDRESS} If the cluster asks for a token (what Ray wrote above says so), also set "
                "RAY_AUTH_MODE=token."
            ) from error
        if c.address is None and c.use_gpu and num_gpus < c.num_workers:
            raise DriverError(
                f"driver.use_gpu=true and driver.num_workers={c.num_workers} were set, but Ray finds {num_gpus} GPUs "
                "on this machine. Fix: fewer ranks, or driver.use_gpu=false."
            )


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
