"""What a fork keeps that a fresh interpreter would have anew."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

# Variables that the dynamic loader, Python, OpenMP, BLAS or torch read once, when they are loaded. Of torch's, some are
# read later; OMP_NUM_THREADS and TORCH_DISTRIBUTED_DEBUG are read again below.
_READ_EARLY = re.compile(
    r"LD_|MALLOC_|GLIBC_|LC_|LANG|PYTHON(?!PATH|HOME|STARTUP|INSPECT|BREAKPOINT|USERBASE)|"
    r"(OMP|GOMP|KMP|MKL|OPENBLAS|GOTO|BLIS|VECLIB|NUMEXPR|NPY|NUMPY|DNNL|ONEDNN|ATEN|PYTORCH)_(?!NUM_THREADS$)|"
    r"(MKL|OPENBLAS|GOTO|BLIS|NUMEXPR)_NUM_THREADS$|"
    r"TORCH(?!ELASTIC_|_NCCL_|_FR_|_GLOO_|_DISTRIBUTED_DEBUG$|_DISABLE_SHARE_RDZV|_HOME$|_EXTENSIONS_DIR$|"
    r"INDUCTOR_CACHE_DIR$)"
)


def read_too_early(at_start: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Variables whose wanted value a fork of a process started with ``at_start`` would not obey."""
    names = (name for name in {*at_start, *wanted} if _READ_EARLY.match(name))
    return sorted(name for name in names if at_start.get(name) != wanted.get(name))


def as_if_fresh() -> None:
    """Renew in a forked process what it must not share with the other ranks, and read again what was read too early."""
    _fresh_randomness()
    time.tzset()
    importlib.invalidate_caches()
    if "tempfile" in sys.modules:
        tempfile: Any = sys.modules["tempfile"]
        tempfile.tempdir = None  # TMPDIR may be another one here
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # the engine silences them for itself
            logging.getLogger(name).disabled = False
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    num_threads = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(num_threads) if num_threads.isdigit() else len(os.sched_getaffinity(0)))
    torch.distributed.set_debug_level_from_env()


def _fresh_randomness() -> None:
    """Unseeded generators start anywhere in a fresh interpreter; forked copies would all draw the same numbers."""
    import random

    random.seed()
    if "numpy.random" in sys.modules:  # numpy imports it when it is used first
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
