"""What a rank's program is told: the variables that torchrun promises to scripts, under every launcher."""

from __future__ import annotations

from collections.abc import Mapping

from everyrank.launch_env.detection import is_loopback_name
from everyrank.launch_env.process_environment import ProcessEnvironment
from everyrank.rendezvous.interfaces import choose_interfaces, is_this_host

_LOOPBACK = "127.0.0.1"


def rank_variables(environment: ProcessEnvironment, environ: Mapping[str, str], error_file: str) -> dict[str, str]:
    """The variables by which a program finds its place in the run.

    Ranks on one machine meet at 127.0.0.1 and gloo listens there alone; over several nodes gloo and NCCL are told which
    interface leads to the master.

    Args:
        environment: The rank's place in the run. A program that no launcher started is told nothing, as by ``python``.
        environ: The variables of the process; what torch's agent has told, and an interface that the user has set,
            stay.
        error_file: Where ``@record`` of torch writes an exception down.
    """
    e = environment
    if e.launcher == "python":
        return {}
    # Without an agent: libraries and scripts that were written for torchrun read them without a default.
    elastic = {
        "ROLE_NAME": "default",
        "TORCHELASTIC_RUN_ID": e.run_id or "everyrank",
        "TORCHELASTIC_RESTART_COUNT": e.restart_count,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": False,
        "TORCHELASTIC_ERROR_FILE": error_file,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": 1,
    }
    variables = {
        **{name: environ.get(name, value) for name, value in elastic.items()},
        "RANK": e.rank,
        "LOCAL_RANK": e.local_rank,
        "WORLD_SIZE": e.world_size,
        "LOCAL_WORLD_SIZE": e.local_world_size,
        "GROUP_RANK": e.node_rank,
        "GROUP_WORLD_SIZE": e.num_nodes,
        "ROLE_RANK": e.rank,
        "ROLE_WORLD_SIZE": e.world_size,
        "MASTER_PORT": e.master_port,
    }
    told = {name: str(value) for name, value in variables.items() if value is not None}
    host = e.master_addr
    if host is None:
        return told
    here = e.num_nodes == 1 and (is_loopback_name(host) or is_this_host(host))
    interfaces, _ = choose_interfaces(environ, on_one_machine=here, towards=host, backend="nccl")
    return {**told, "MASTER_ADDR": _LOOPBACK if here else host, **interfaces}
