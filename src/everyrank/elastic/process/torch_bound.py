"""Which torch this package works with, and the private names that are why.

Names without a promise change between minor releases: each that we use is written here, and a test looks whether it is
there. ``pyproject.toml`` and README state the same bound.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re

from everyrank.errors import ConfigError

LOWEST = (2, 13)
BELOW = (2, 14)
SUPPORTED = f">={'.'.join(map(str, LOWEST))},<{'.'.join(map(str, BELOW))}"

_AGENT = "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent"
_CONTEXT = "torch.distributed.elastic.multiprocessing.api"
PRIVATE_NAMES = (
    f"{_AGENT}._start_workers",
    f"{_AGENT}._stop_workers",
    f"{_AGENT}._monitor_workers",
    f"{_AGENT}._shutdown",
    f"{_CONTEXT}:PContext._start",
    f"{_CONTEXT}:PContext._close",
    f"{_CONTEXT}:LogsSpecs.reify",
    f"{_CONTEXT}:MultiprocessContext._start",
    "torch.distributed.elastic.rendezvous:RendezvousStoreInfo",
    "torch.distributed.distributed_c10d:_world.pg_map",
    "torch.distributed.distributed_c10d:_abort_process_group",
    "torch.distributed.distributed_c10d:_get_default_store",
    "torch.distributed:set_debug_level_from_env",
    "torch:_disable_dynamo",
    "torch._compile:_disable_dynamo",
    "torch._dynamo:optimize",
    "torch._dynamo.guards:recompiles_log",
    "torch._inductor.config:deterministic",
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch._logging._internal:log_state.enable_artifact",
    "torch._logging._internal:log_state.is_artifact_enabled",
    "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter._shutdown_workers",
    "torch._library.utils:get_source",
    "torch:_check_with",
    "torch:_foreach_lerp_",
    "torch:_foreach_mul_",
    "torch:_foreach_add_",
    "torch:_foreach_copy_",
)


def is_supported(version: str) -> bool:
    """Whether this package works with a version of torch, such as ``2.13.0+cpu``."""
    return LOWEST <= tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < BELOW


@functools.cache
def check_torch() -> None:
    """Refuse a torch that this package was not made for, without importing it.

    Raises:
        ConfigError: torch is missing, too old or too new.
    """
    wanted = f"torch{SUPPORTED}"
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"torch is not installed here. Fix: pip install '{wanted}'.") from None
    if not is_supported(version):
        raise ConfigError(
            f"torch {version} is installed, but this everyrank works with {wanted}: it uses parts of torch's launcher "
            f"that change between releases. Fix: pip install '{wanted}'."
        )
