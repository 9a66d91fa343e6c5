"""``driver=torchrun``: torch's elastic engine, on one machine or many."""

from __future__ import annotations

from everyrank.diagnosis.outcome import Outcome
from everyrank.drivers.driver import Driver, LaunchPlan, LaunchRequest, rank_variables
from everyrank.drivers.ssh import SshDriver
from everyrank.drivers.torchrun_config import TorchrunConfig, check_master, check_node
from everyrank.elastic import engine_pool
from everyrank.elastic.machine import resolve_nproc, resolve_start_method
from everyrank.elastic.spec import EngineRun, Rendezvous
from everyrank.errors import DriverError, did_you_mean
from everyrank.launch_env.process_environment import SUPERVISED
from everyrank.program.command import EXECUTABLE
from everyrank.rendezvous.ports import check_port_is_free, split_endpoint

_BACKENDS = ("static", "c10d", "etcd", "etcd-v2")


class TorchrunDriver(Driver[TorchrunConfig]):
    """What ``torchrun`` does, by the same engine, with the ranks forked from one import of torch."""

    name = "torchrun"
    config_type = TorchrunConfig

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        """Check the settings against each other and work the launch out.

        Raises:
            DriverError: They contradict each other.
        """
        c = self.config
        if c.hosts:
            return SshDriver(c).plan(request)
        nproc = resolve_nproc(c.nproc_per_node, "driver.nproc_per_node", request.device)
        min_nodes, max_nodes = self._nodes()
        rendezvous, notices = self._rendezvous(min_nodes, max_nodes)
        env = rank_variables(request, c.threads_per_rank)
        if rendezvous.backend.startswith("etcd"):
            # Cures two faults of torch 2.13: a late joiner that hangs, and restarts that reconnect to dead addresses.
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        command = self._command(request, nproc, min_nodes, max_nodes, rendezvous)
        start_method = resolve_start_method(c.start_method, "driver.start_method")
        nodes = str(max_nodes) if min_nodes == max_nodes else f"{min_nodes} to {max_nodes}"
        master = rendezvous.endpoint or (f"127.0.0.1:{c.master_port}" if c.master_port else "127.0.0.1, any free port")
        engine = EngineRun(
            entry="everyrank.worker:run_rank",
            args=(request.config_file,),
            role=c.role,
            nproc_per_node=nproc,
            min_nodes=min_nodes,
            max_nodes=max_nodes,
            rendezvous=rendezvous,
            master_port=c.master_port or 0,
            max_restarts=c.max_restarts,
            monitor_interval_s=c.monitor_interval,
            start_method=start_method,
            log_dir=request.log_dir,
            cwd=request.cwd,
            sys_path=request.sys_path,
            env={**env, SUPERVISED: "1"},
            shutdown_timeout_s=c.shutdown_timeout_s,
            failure_grace_s=c.failure_grace_s,
            preload=request.preload,
        )
        return self.planned(
            request,
            command,
            nproc,
            summary=(
                f"processes per node: {nproc} (start method {start_method})",
                f"nodes: {nodes}" + (f" (this is node {c.node_rank})" if rendezvous.backend == "static" else ""),
                f"master: {master} (rendezvous {rendezvous.backend})",
            ),
            env=env,
            notices=notices,
            engine=engine,
        )

    def run(self, plan: LaunchPlan, request: LaunchRequest) -> Outcome:
        """Carry the plan out on this node."""
        if self.config.hosts:
            return SshDriver(self.config).run(plan, request)
        assert plan.engine is not None
        if plan.engine.master_port and plan.engine.rendezvous.backend == "loopback":
            check_port_is_free(plan.engine.master_port)
        return engine_pool.run(plan.engine)

    def _nodes(self) -> tuple[int, int]:
        c = self.config
        min_nodes = c.min_nodes if c.min_nodes is not None else (c.nnodes if c.max_nodes is None else 1)
        max_nodes = c.max_nodes if c.max_nodes is not None else max(c.nnodes, min_nodes)
        if min_nodes > max_nodes:
            raise DriverError(
                f"driver.min_nodes={min_nodes} is larger than driver.max_nodes={max_nodes}. "
                f"Set driver.max_nodes={min_nodes} or more, or driver.min_nodes={max_nodes} or fewer."
            )
        check_node(c, max_nodes)
        if c.master_port is not None and not 0 < c.master_port < 65536:
            raise DriverError(
                f"driver.master_port={c.master_port} was set; a port lies between 1 and 65535. "
                "Leave it out on one machine: a free port is then chosen."
            )
        return min_nodes, max_nodes

    def _rendezvous(self, min_nodes: int, max_nodes: int) -> tuple[Rendezvous, tuple[str, ...]]:
        c = self.config
        if c.rdzv_backend is not None and c.rdzv_backend not in _BACKENDS:
            raise DriverError(
                f"driver.rdzv_backend={c.rdzv_backend} was set; it is one of {', '.join(_BACKENDS)}."
                f"{did_you_mean(c.rdzv_backend, _BACKENDS)}"
            )
        run_id = "" if c.rdzv_id is None else str(c.rdzv_id)
        if max_nodes == 1 and not c.rdzv_endpoint and c.rdzv_backend is None and c.standalone:
            return Rendezvous(run_id=run_id), ()
        run_id = run_id or "everyrank"
        notices: tuple[str, ...] = ()
        if c.standalone:
            reason = "driver.rdzv_endpoint is set" if c.rdzv_endpoint else f"there are up to {max_nodes} nodes"
            if max_nodes == 1 and not c.rdzv_endpoint:
                reason = f"driver.rdzv_backend={c.rdzv_backend} is set"
            notices = (f"driver.standalone yields because {reason}",)
        backend = c.rdzv_backend or ("c10d" if c.rdzv_endpoint or min_nodes != max_nodes else "static")
        if backend == "static":
            if max_nodes > 1:
                check_master(c)
            endpoint = f"{c.master_addr or '127.0.0.1'}:{c.master_port or 29500}"
            split_endpoint(endpoint, "driver.master_addr:driver.master_port")
            config = {"timeout_s": c.rdzv_timeout_s}
            return Rendezvous(
                backend="static", endpoint=endpoint, run_id=run_id, node_rank=c.node_rank, config=config
            ), notices
        endpoint = c.rdzv_endpoint or (f"{c.master_addr}:{c.master_port or 29500}" if c.master_addr else "")
        if not endpoint:
            raise DriverError(
                "an elastic run needs a place to meet, but driver.rdzv_endpoint is not set. "
                "Set driver.rdzv_endpoint=HOST:29500, the same on every node."
            )
        host, port = split_endpoint(endpoint, "driver.rdzv_endpoint")
        endpoint = f"{host}:{port}"
        if backend == "c10d":
            config = {"timeout_s": c.rdzv_timeout_s, "last_call_s": c.rdzv_last_call_s}
        else:
            config = {"join_timeout": int(c.rdzv_timeout_s), "last_call_timeout": int(c.rdzv_last_call_s)}
        return Rendezvous(backend=backend, endpoint=endpoint, run_id=run_id, config=config), notices

    def _command(
        self, request: LaunchRequest, nproc: int, min_nodes: int, max_nodes: int, rendezvous: Rendezvous
    ) -> tuple[str, ...]:
        c = self.config
        nodes = str(max_nodes) if min_nodes == max_nodes else f"{min_nodes}:{max_nodes}"
        flags = [f"--nnodes={nodes}", f"--nproc-per-node={nproc}", f"--max-restarts={c.max_restarts}"]
        if rendezvous.backend == "loopback" and not c.master_port:
            flags.insert(0, "--standalone")
        elif rendezvous.backend in ("loopback", "static"):
            host, _, port = (rendezvous.endpoint or f"127.0.0.1:{c.master_port}").rpartition(":")
            flags += [f"--node-rank={c.node_rank}", f"--master-addr={host}", f"--master-port={port}"]
        else:
            flags += [f"--rdzv-backend={rendezvous.backend}", f"--rdzv-endpoint={rendezvous.endpoint}"]
            flags += [f"--rdzv-id={rendezvous.run_id}"]
        program = request.program
        if program is not None and program.kind == EXECUTABLE:
            flags.append("--no-python")
        return ("torchrun", *flags, *(request.worker if program is None else program.words))
