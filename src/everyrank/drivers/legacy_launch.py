"""``driver=launch``: legacy ``python -m torch.distributed.launch``, for clusters that still call it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from everyrank.config.schema import field, section
from everyrank.diagnosis.launcher_words import exit_codes
from everyrank.diagnosis.outcome import Outcome
from everyrank.diagnosis.rank_files import clear_errors
from everyrank.drivers.cluster import recorded_failures
from everyrank.drivers.driver import Driver, DriverConfig, LaunchPlan, LaunchRequest, python_path, rank_variables
from everyrank.drivers.torchrun_config import check_master, check_node
from everyrank.elastic.guarded import guarded
from everyrank.elastic.machine import resolve_nproc
from everyrank.elastic.process.sweep import MARK
from everyrank.elastic.process.sweeping import new_mark, swept
from everyrank.elastic.signals import forwarded, signals_to
from everyrank.launch_env.process_environment import SUPERVISED
from everyrank.rendezvous.ports import check_port_is_free


@section
class LegacyLaunchConfig(DriverConfig):
    """``driver=launch``: ``python -m torch.distributed.launch``."""

    nproc_per_node: int | str = field(default=2, doc="Number of processes on this node, or `auto`, `gpu`, `cpu`.")
    nnodes: int = field(default=1, ge=1, doc="Number of nodes.")
    node_rank: int = field(default=0, ge=0, doc="This node's rank.")
    master_addr: str | None = field(default=None, doc="Host of node 0; null for one node.")
    master_port: int | None = field(default=None, doc="Port on node 0; null finds a free one on one node.")
    use_env: bool | None = field(
        default=None,
        doc="Pass `--use-env`: the local rank in `LOCAL_RANK` only, not on the command line. null: so for programs "
        "that do not mention `--local-rank` or `--local_rank`.",
    )
    max_restarts: int = field(default=0, ge=0, doc="How often the group is started again after a failure.")

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self.nnodes


class LegacyLaunchDriver(Driver[LegacyLaunchConfig]):
    """Runs torch's legacy launcher as a child and reads what its ranks recorded."""

    name = "launch"
    config_type = LegacyLaunchConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Plan the one command."""
        c = self.config
        nproc = resolve_nproc(c.nproc_per_node, "driver.nproc_per_node", request.device)
        check_node(c, c.nnodes)
        flags = [f"--nproc-per-node={nproc}", f"--max-restarts={c.max_restarts}"]
        flags.append(
            f"--log-dir={request.log_dir}/launcher"
        )  # else each launch leaves a folder in the temporary folder
        if c.nnodes > 1:
            check_master(c)
            flags += [f"--nnodes={c.nnodes}", f"--node-rank={c.node_rank}"]
            flags += [f"--master-addr={c.master_addr}", f"--master-port={c.master_port}"]
        else:
            # torch's own ways for one machine listen on all of its addresses, --standalone too.
            flags.insert(0, f"--rdzv-endpoint=127.0.0.1:{c.master_port or 0}")
        # Most programs read LOCAL_RANK, and end at an option they do not know.
        wanted = request.program is None or request.program.local_rank_option is not None
        if c.use_env if c.use_env is not None else not wanted:
            flags.append("--use-env")
        launcher = "torch.distributed.launch" if c.nnodes > 1 else "everyrank.elastic.legacy_launcher"
        return self.planned(
            request,
            (sys.executable, "-m", launcher, *flags, *request.worker),
            nproc,
            summary=(f"processes per node: {nproc}", f"nodes: {c.nnodes}"),
            env={**rank_variables(request, c.threads_per_rank), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Run the launcher to its end."""
        c = self.config
        if c.master_port and c.nnodes == 1:
            check_port_is_free(c.master_port)
        clear_errors(request.log_dir)
        mark = new_mark()
        env = {**os.environ, **plan.env, **mark, SUPERVISED: "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
        env.update(python_path(request))
        command = guarded(plan.command)
        os.makedirs(request.log_dir, exist_ok=True)
        log_path = os.path.join(request.log_dir, "launcher.log")
        with open(log_path, "wb") as log, swept(mark[MARK]):
            process = subprocess.Popen(
                command, cwd=request.cwd, env=env, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
            with forwarded(signals_to(process), lambda: os.killpg(process.pid, signal.SIGKILL)) as told:
                code = process.wait()
        with open(log_path, encoding="utf-8", errors="replace") as log_text:
            failures = recorded_failures(request.log_dir, exit_codes(log_text.read())) if code else ()
        message = ""
        if code and not failures and told.signum is None:
            message = f"error: torch.distributed.launch ended with exit code {code}\n  its log: {log_path}"
        return Outcome(failures=failures, signum=told.signum, message=message, world_size=plan.world_size or 0)
