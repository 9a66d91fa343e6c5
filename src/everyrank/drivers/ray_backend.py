"""How the ranks of a Ray trainer meet: by the variables that torchrun sets.

Ray's own backend joins the process group before the training loop starts, with its own timeout and without our
handshake; ours only says where to meet, so that an app joins as under every other launcher.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig


@dataclass
class MeetByVariables(TorchConfig):
    """Configuration of the backend."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend."""
        return _Variables


class _Variables(Backend):
    """Sets the variables on every worker."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _free_place)
        worker_group.execute(_set_variables, {"MASTER_ADDR": address, "MASTER_PORT": str(port)})

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(_set_rank)


def _free_place() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _set_variables(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _set_rank() -> None:
    context = ray.train.get_context()
    _set_variables(
        {
            "RANK": str(context.get_world_rank()),
            "WORLD_SIZE": str(context.get_world_size()),
            "LOCAL_RANK": str(context.get_local_rank()),
            "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
            "NODE_RANK": str(context.get_node_rank()),
        }
    )
