"""Settings of torch's elastic engine: on one machine, on nodes, and over ssh."""

from __future__ import annotations

from everyrank.config.schema import field, section
from everyrank.drivers.driver import DriverConfig
from everyrank.elastic.machine import default_start_method
from everyrank.errors import DriverError, did_you_mean


@section
class TorchrunConfig(DriverConfig):
    """``driver=torchrun``: torch's elastic engine.

    Attributes:
        nproc_per_node: Number of processes on this node, or ``auto``, ``gpu``, ``cpu``.
        nnodes: Number of nodes.
        node_rank: This node's rank, when ``nnodes`` > 1.
        master_addr: Host of node 0, when ``nnodes`` > 1.
        master_port: Port on node 0; on one machine null finds a free one.
        rdzv_backend: ``static`` or ``c10d``; null chooses.
        rdzv_endpoint: ``host:port`` of an elastic rendezvous.
        rdzv_id: The id the nodes of a run share.
        rdzv_timeout_s: Seconds a node waits for the others.
        min_nodes: Nodes an elastic run starts with; null means ``nnodes``.
        max_nodes: Nodes an elastic run grows to; null means ``nnodes``.
        max_restarts: How often a failed group is started again.
        monitor_interval: Seconds between two looks at the ranks.
        start_method: ``forkserver``, ``spawn`` or ``fork``; null chooses.
        standalone: One machine, nothing to configure; yields when several nodes or an endpoint are set.
        no_python: The app's command is a program, not a Python script.
        shutdown_timeout_s: Seconds the ranks have to save and leave after a signal.
        failure_grace_s: Seconds the other ranks have to end by themselves after one failed.
        hosts: Start all nodes from here, by ssh; the hosts share this folder and this Python.
        ssh_args: Further options of ssh, as they are.
    """

    nproc_per_node: int | str = 2
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    hosts: list[str] = field(factory=list, doc="Start all nodes from here, by ssh.")
    ssh_args: list[str] = field(factory=list, doc="Further options of ssh, as they are.")
    rdzv_backend: str | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    rdzv_timeout_s: float = 300.0
    min_nodes: int | None = None
    max_nodes: int | None = None
    max_restarts: int = 0
    monitor_interval: float = 0.05
    start_method: str | None = None
    standalone: bool = True
    no_python: bool = False
    shutdown_timeout_s: float = 30.0
    failure_grace_s: float = 1.0

    @property
    def num_nodes(self) -> int:
        """Nodes of the run, the most there may be of an elastic one."""
        return len(self.hosts) or self.max_nodes or max(self.nnodes, self.min_nodes or 1)

    @property
    def shares_folder(self) -> bool:
        """One command a node, each of which uses the folder; with ``hosts`` there is only this one."""
        return not self.hosts and (self.num_nodes > 1 or self.rdzv_endpoint is not None)

    @property
    def effective_start_method(self) -> str:
        """The start method that was set, or the machine's default.

        Raises:
            DriverError: It is none of those there are.
        """
        methods = ("forkserver", "spawn", "fork")
        method = self.start_method or default_start_method()
        if method not in methods:
            raise DriverError(
                f"driver.start_method={method} was set; it is one of {', '.join(methods)}."
                f"{did_you_mean(method, methods)}"
            )
        return method
