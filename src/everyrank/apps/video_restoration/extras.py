"""Packages that only video data need: imported when used, and asked for by the name of the extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from everyrank import DataError


def video_package(module: str) -> ModuleType:
    """Return the module of a package of the extra ``everyrank[video]``.

    Raises:
        DataError: It is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"these options need the package of {module.split('.')[0]!r}, which is not installed ({error}). "
            "Install it with: pip install 'everyrank[video]'"
        ) from error
