"""A program written for CUDA and NCCL runs its real training on CPU ranks, unchanged.

``environment`` gives the variables that switch it on in every Python of a job; ``install`` switches it on in a process
that has imported torch already. Nothing here is imported by a run that does not rehearse.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from everyrank.launch_env.guard import add_startup

REHEARSE = "EVERYRANK_REHEARSE"
DEVICES = "EVERYRANK_REHEARSE_DEVICES"


def environment(local_world_size: int, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that make every Python of a job rehearse, also those which the program starts itself.

    Args:
        local_world_size: CUDA devices to show where no launcher says how many ranks this machine has, and
            EVERYRANK_REHEARSE_DEVICES does not either.
        environ: The variables the job would have otherwise; those of this process by default.

    Returns:
        The variables to set. A ``sitecustomize`` of the user's is run as before.
    """
    environ = os.environ if environ is None else environ
    return {
        REHEARSE: "cpu",
        DEVICES: environ.get(DEVICES) or str(local_world_size),
        "PYTHONPATH": add_startup(environ.get("PYTHONPATH", "")),
    }


def install() -> None:
    """Rehearse in this process, from its first ``import torch`` on, or at once if torch is imported already.

    The Pythons that it starts rehearse as well.
    """
    from everyrank.rehearsal.hook import install_hook

    os.environ.update(environment(1))
    install_hook()
