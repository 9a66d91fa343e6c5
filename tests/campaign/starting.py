"""Starting the certificate's app, hurt, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hurt_run import Harm
from warm_start import Started

Start = Callable[..., Started]


def start_command(
    start_cli: Start, harm: Harm, run: Path, num_workers: int = 0, extra: tuple[str, ...] = ()
) -> Started:
    """Start ``run.py driver=torchrun app=certify`` on two ranks, one of which sends a signal."""
    return start_cli(
        "driver=torchrun",
        "app=certify",
        "app._target_=hurt_run.Hurt",
        "app.apply_model=hurt_run.apply_model",
        "app.model.type=hurt_run.network",
        "app.data.kwargs.delay_s=0",
        f"+app.training.num_workers={num_workers}",
        "+app.training.log_every_steps=1",
        f"run.dir={run}",
        harm.as_override(),
        *extra,
    )
