"""Makes the programs that the ranks run importable, here and in the ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = str(Path(__file__).parent / "programs")


@pytest.fixture(scope="session", autouse=True)
def _programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROGRAMS)
        patch.setenv("PYTHONPATH", PROGRAMS)
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            # torch's optimizers make a folder for compiled code in the temporary folder: put it apart.
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiler")))
        yield


if PROGRAMS not in sys.path:  # test modules import the programs while they are collected
    sys.path.insert(0, PROGRAMS)
