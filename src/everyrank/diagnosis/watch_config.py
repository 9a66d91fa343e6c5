"""``watch``: how long ranks may stand still, and what then happens."""

from __future__ import annotations

from collections.abc import Mapping

from everyrank.config.schema import field, section
from everyrank.diagnosis.flight import NUM_ENTRIES
from everyrank.diagnosis.rank_files import WATCH, watch_dir


@section
class WatchConfig:
    """``watch``: who keeps the others waiting."""

    enabled: bool = field(default=True, doc="Watch the ranks: name the one that keeps the others waiting, and why.")
    stall_s: float = field(
        default=10.0, gt=0, doc="Seconds without a collective, while a rank waits in one, until it is said who waits."
    )
    end_after_s: float | None = field(
        default=600.0,
        gt=0,
        doc="Seconds until such a run is ended although it might go on; null: never. One that provably cannot go on is "
        "ended at once. On the command line the default is distributed.timeout_s.",
    )
    lost_after_s: float = field(
        default=90.0,
        gt=0,
        doc="On several hosts: seconds without a sign of life from one, while a rank waits for it, until it is held to "
        "be lost. A host that is only slow must be heard by then.",
    )


def watch_variables(run_dir: str, enabled: bool, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with which the ranks of a run report.

    Args:
        run_dir: The run's folder.
        enabled: ``watch.enabled``.
        environ: The variables that the ranks would have otherwise; values in it are kept.
    """
    if not enabled:
        return {}
    return {
        WATCH: watch_dir(run_dir),
        "TORCH_FR_BUFFER_SIZE": environ.get("TORCH_FR_BUFFER_SIZE", str(NUM_ENTRIES)),
    }
