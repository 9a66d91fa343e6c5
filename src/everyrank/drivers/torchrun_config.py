"""Settings of torch's elastic engine: on one machine, on nodes, and over ssh."""

from __future__ import annotations

from typing import Any

from everyrank.config.schema import field, section
from everyrank.drivers.driver import DriverConfig
from everyrank.errors import DriverError


@section
class TorchrunConfig(DriverConfig):
    """``driver=torchrun``: torch's elastic engine."""

    nproc_per_node: int | str = field(default=2, doc="Number of processes on this node, or `auto`, `gpu`, `cpu`.")
    nnodes: int = field(default=1, ge=1, doc="Number of nodes.")
    node_rank: int = field(default=0, ge=0, doc="0 on the first node, 1 on the second ...")
    master_addr: str | None = field(default=None, doc="Host of node 0, when `nnodes` > 1.")
    master_port: int | None = field(default=None, doc="Port on node 0; on one machine null finds a free one.")
    hosts: list[str] = field(
        factory=list,
        doc="Start all nodes from here, by ssh: the hosts share this folder and this Python; the first is node 0.",
    )
    ssh_args: list[str] = field(factory=list, doc="Further options of ssh, as they are.")
    rdzv_backend: str | None = field(
        default=None, doc="`static`, `c10d` or another of torch's; null: static, or c10d with an endpoint."
    )
    rdzv_endpoint: str | None = field(default=None, doc="`host:port` of an elastic rendezvous, the same on every node.")
    rdzv_id: int | str | None = field(default=None, doc="A name for the job, the same on every node.")
    rdzv_timeout_s: float = field(default=300.0, gt=0, doc="Seconds a node waits for the others.")
    rdzv_last_call_s: float = field(
        default=2.0, ge=0, doc="Seconds an elastic run waits for further nodes once there are enough."
    )
    min_nodes: int | None = field(default=None, ge=1, doc="Nodes an elastic run starts with; null means `nnodes`.")
    max_nodes: int | None = field(default=None, ge=1, doc="Nodes an elastic run grows to; null means `nnodes`.")
    max_restarts: int = field(default=0, ge=0, doc="How often a failed group is started again.")
    monitor_interval: float = field(default=0.05, gt=0, doc="Seconds between two looks at the ranks.")
    start_method: str | None = field(
        default=None, doc="`forkserver` (default on Linux: one import of torch for all ranks), `spawn` or `fork`."
    )
    standalone: bool = field(
        default=True, doc="One machine, nothing to configure; yields when several nodes or an endpoint are set."
    )
    role: str = field(default="default", doc="What torchelastic calls the ranks, in `ROLE_NAME`.")
    shutdown_timeout_s: float = field(
        default=30.0, ge=0, doc="Seconds the ranks have to save and leave after a signal."
    )
    failure_grace_s: float = field(
        default=1.0, ge=0, doc="Seconds the other ranks have to end by themselves after one failed."
    )

    @property
    def num_nodes(self) -> int:
        """Nodes of the run, the most there may be of an elastic one."""
        return len(self.hosts) or self.max_nodes or max(self.nnodes, self.min_nodes or 1)

    @property
    def shares_folder(self) -> bool:
        """One command a node, each of which uses the folder; with ``hosts`` there is only this one."""
        return not self.hosts and (self.num_nodes > 1 or self.rdzv_endpoint is not None)


def check_node(config: Any, num_nodes: int) -> None:
    """Raise DriverError if ``node_rank`` is none of so many nodes."""
    if not 0 <= config.node_rank < num_nodes:
        raise DriverError(
            f"driver.node_rank={config.node_rank} was set with driver.nnodes={num_nodes}: "
            f"node ranks run from 0 to {num_nodes - 1}."
        )


def check_master(config: Any) -> None:
    """Raise DriverError if several nodes are to find node 0, but nobody says where it is."""
    if not (config.master_addr and config.master_port):
        raise DriverError(
            f"driver.nnodes={config.num_nodes} was set, but driver.master_addr={config.master_addr} and "
            f"driver.master_port={config.master_port}. Every node must name node 0: "
            "driver.master_addr=HOST driver.master_port=29500."
        )
