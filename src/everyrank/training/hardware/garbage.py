"""Collecting garbage when all ranks do, instead of when Python likes.

Python's collector starts by itself in the middle of a step, on each rank in another one: every rank then waits for each
of the others in turn. Looking through a large model's objects takes it tens of milliseconds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WARM_UP_STEPS = 3  # after them what lives will live to the end: model, optimizer state, buckets, workers


@contextmanager
def collecting_every(num_steps: int | None, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Switch Python's own collections off for the block, and collect after every n-th step of the optimizer.

    After warm-up everything that lives is frozen (``gc.freeze``), so that no later collection looks at it. At the end
    of the block all is as it was before.

    Args:
        num_steps: Steps from one collection to the next; None leaves it to Python.
        optimizer: Its steps are counted.
    """
    if num_steps is None:
        yield
        return
    count = 0

    def after_step(*_: object) -> None:
        nonlocal count
        count += 1
        if count == _WARM_UP_STEPS:
            gc.collect()
            gc.freeze()
        elif count > _WARM_UP_STEPS and count % num_steps == 0:
            gc.collect()

    was_on = gc.isenabled()
    gc.disable()
    handle = optimizer.register_step_post_hook(after_step)
    try:
        yield
    finally:
        handle.remove()
        gc.unfreeze()
        if was_on:
            gc.enable()
