"""Video restoration (VRT, arXiv 2201.12288) from JSON option files.

Public names are loaded when first used: reading options needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everyrank.apps.video_restoration.app import VideoRestorationApp
    from everyrank.apps.video_restoration.network.vrt import VRT
    from everyrank.apps.video_restoration.options import load_options

_EXPORTS = {"VRT": "network.vrt", "load_options": "options", "VideoRestorationApp": "app"}

__all__ = ["VRT", "VideoRestorationApp", "load_options"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
