"""``driver=torchrun driver.hosts=[a,b]``: all nodes of a run from one command, over ssh.

The hosts share the run's folder and this Python. Each runs ``everyrank.drivers.node``, whose standard input stays
connected to this process: when this process ends, for whatever reason, the nodes end.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from everyrank.diagnosis.outcome import Outcome, RankFailure
from everyrank.diagnosis.rank_files import clear_errors
from everyrank.drivers.cluster import SSH, check_hosts, exports, node_command, recorded_failures, secrets_of
from everyrank.drivers.driver import Driver, LaunchPlan, LaunchRequest, rank_variables
from everyrank.drivers.torchrun_config import TorchrunConfig
from everyrank.elastic.guarded import guarded
from everyrank.elastic.signals import forwarded
from everyrank.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, DriverError
from everyrank.rendezvous.ports import DEFAULT_PORT

_SSH_FAILED = 255
_FAREWELL_S = 20.0  # how long the other nodes have to end by themselves after one has failed


class SshDriver(Driver[TorchrunConfig]):
    """Starts a node on each host and holds the other end of its standard input."""

    name = "torchrun"
    config_type = TorchrunConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan one command for each host.

        Raises:
            DriverError: Settings that contradict ``driver.hosts``.
        """
        c = self.config
        if c.rdzv_endpoint or c.rdzv_backend or c.min_nodes or c.max_nodes or c.nnodes not in (1, len(c.hosts)):
            raise DriverError(
                f"driver.hosts={list(c.hosts)} was set with driver.nnodes, driver.min_nodes or a rendezvous. The hosts "
                "are the nodes: leave the others out, or leave driver.hosts out and start each node yourself."
            )
        check_hosts(c.hosts)
        env = rank_variables(request, c.threads_per_rank)
        commands = [self._command(request, env, rank) for rank in range(len(c.hosts))]
        return self.planned(
            request,
            commands[0],
            c.nproc_per_node if isinstance(c.nproc_per_node, int) else None,
            summary=(
                *(f"command: {shlex.join(command)}" for command in commands[1:]),
                f"processes per node: {c.nproc_per_node}",
                f"nodes: {len(c.hosts)} (over ssh: {', '.join(c.hosts)})",
            ),
            env=env,
        )

    def _command(self, request: LaunchRequest, env: dict[str, str], node_rank: int) -> tuple[str, ...]:
        c = self.config
        settings = {
            "nproc_per_node": c.nproc_per_node,
            "max_restarts": c.max_restarts,
            "start_method": c.start_method,
            "rdzv_timeout_s": c.rdzv_timeout_s,
            "shutdown_timeout_s": c.shutdown_timeout_s,
        }
        if len(c.hosts) > 1:
            settings["nnodes"] = len(c.hosts)
            settings["node_rank"] = node_rank
            settings["master_addr"] = c.master_addr or c.hosts[0].rpartition("@")[2]
            settings["master_port"] = c.master_port or DEFAULT_PORT
        flags = [f"driver.{key}={value}" for key, value in settings.items() if value is not None]
        start = "exec " + shlex.join(node_command(sys.executable, request, "--attached", *flags))
        script = "; ".join([*exports(env, request), f"cd {shlex.quote(request.cwd)} && {start}"])
        return ("ssh", "-o", "BatchMode=yes", *c.ssh_args, c.hosts[node_rank], script)

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Start all nodes and wait for their end."""
        SSH.require()
        clear_errors(request.log_dir)
        hosts, env = self.config.hosts, dict(plan.env)
        nodes = [
            subprocess.Popen(
                guarded(self._command(request, env, rank)), stdin=subprocess.PIPE, text=True, process_group=0
            )
            for rank in range(len(hosts))
        ]

        secrets = json.dumps(secrets_of(env))
        for node in nodes:
            with contextlib.suppress(OSError):
                print(secrets, file=node.stdin, flush=True)

        def send(signum: int) -> None:
            for node in nodes:
                with contextlib.suppress(OSError, ValueError):
                    assert node.stdin is not None
                    print(signum, file=node.stdin, flush=True)

        def kill() -> None:
            for node in nodes:
                node.kill()

        with forwarded(send, kill) as told:
            codes, first = _wait(nodes)
        if first is not None and codes[first] == _SSH_FAILED:
            raise DriverError(
                f"driver.hosts names {hosts[first]}, but ssh could not start anything there, or lost it (it said why "
                f"above). Fix: make `ssh -o BatchMode=yes {hosts[first]} true` work from here, without a "
                "password; driver.ssh_args takes further options."
            )
        failures = recorded_failures(request.log_dir) if any(codes) else ()
        if EXIT_PREEMPTED in codes and not failures:
            failures = (RankFailure(rank=0, exit_code=EXIT_PREEMPTED),)
        message = ""
        if any(codes) and not failures and told.signum is None:
            node_rank = min(
                (rank for rank, code in enumerate(codes) if code), key=lambda rank: codes[rank] != EXIT_BAD_INPUT
            )
            message = (
                f"node {node_rank} ({hosts[node_rank]}) ended with exit code {codes[node_rank]}; what it said is above"
            )
        return Outcome(failures=failures, signum=told.signum, message=message, user_error=EXIT_BAD_INPUT in codes)


def _wait(nodes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], int | None]:
    """Wait for all nodes; when one has failed, the others end by themselves, or are ended.

    Returns:
        The exit codes, and which node failed first.
    """
    deadline: float | None = None
    first: int | None = None
    while True:
        codes = [node.poll() for node in nodes]
        if first is None and any(codes):
            first = next(rank for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + (0 if codes[first] == _SSH_FAILED else _FAREWELL_S)
        if None not in codes:
            break
        if deadline is not None and time.monotonic() > deadline:
            for node in nodes:
                if node.stdin is not None:
                    with contextlib.suppress(OSError):
                        node.stdin.close()
            deadline = time.monotonic() + _FAREWELL_S
        time.sleep(0.05)
    return [code if code >= 0 else 128 - code for code in (node.wait() for node in nodes)], first
