"""Makes the programs that the ranks run importable, here and in the ranks, and what they import there once for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import everyrank

PROGRAMS = str(Path(__file__).parent / "programs")
# Without a preload each rank of each launch would import all of it again.
_PRELOAD = ("torch.distributed.fsdp", "torchmetrics")


@pytest.fixture(scope="session", autouse=True)
def _programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROGRAMS)
        patch.setenv("PYTHONPATH", PROGRAMS)
        if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            # torch's optimizers make a folder for compiled code in the temporary folder: put it apart.
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiler")))
        yield


@pytest.fixture(scope="session")
def _imported_once(_scratch: Path) -> None:
    everyrank.launch(os.getpid, nproc_per_node=1, preload=_PRELOAD)


@pytest.fixture(scope="module", autouse=True)
def _ranks_are_forked_warm(request: pytest.FixtureRequest) -> None:
    """The engine keeps what one launch has preloaded for those that follow."""
    if "launch(" in request.path.read_text(encoding="utf-8"):
        request.getfixturevalue("_imported_once")


if PROGRAMS not in sys.path:  # test modules import the programs while they are collected
    sys.path.insert(0, PROGRAMS)
