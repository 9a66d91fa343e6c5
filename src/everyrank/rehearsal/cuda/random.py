"""CUDA's random generators: states of their own, so that seeding or restoring them leaves the CPU's alone.

Random numbers on rehearsed devices come from the CPU's generator: dropout does not say where it draws.
"""

from __future__ import annotations

from typing import Any

import torch

from everyrank.rehearsal.devices import REAL_DEVICE, asked_by_torch, count, cuda_index, index_or_current
from everyrank.rehearsal.patching import replace

_REAL_GENERATOR = torch.Generator
_GENERATORS: dict[int, torch.Generator] = {}


def _of(device: Any = None) -> torch.Generator:
    index = index_or_current(device)
    return _GENERATORS.setdefault(index, _REAL_GENERATOR())


def _seed(seed: int) -> None:
    _of().manual_seed(int(seed))


def _seed_all(seed: int) -> None:
    for index in range(count()):
        # Asking for the count only: to seed every device uses none, and a process that has seeded may still fork.
        _GENERATORS.setdefault(index, _REAL_GENERATOR()).manual_seed(int(seed))


def _set_states(states: Any) -> None:
    for index, state in enumerate(states):
        _of(index).set_state(state.cpu())


FUNCTIONS: dict[str, Any] = {
    "manual_seed": _seed,
    "manual_seed_all": _seed_all,
    "seed": lambda: _of().seed(),
    "seed_all": lambda: _seed_all(_of().seed()),
    "initial_seed": lambda: _of().initial_seed(),
    "get_rng_state": lambda device="cuda": _of(device).get_state(),
    "get_rng_state_all": lambda: [_of(index).get_state() for index in range(count())],
    "set_rng_state": lambda new_state, device="cuda": _of(device).set_state(new_state.cpu()),
    "set_rng_state_all": _set_states,
}


class _GeneratorMeta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _REAL_GENERATOR)


class _CudaGenerator(_REAL_GENERATOR):
    """A generator in CPU memory that says which CUDA device it was made for."""

    rehearsed_index = 0

    @property
    def device(self) -> Any:  # type: ignore[override]
        """The CUDA device it was made for."""
        return REAL_DEVICE("cpu") if asked_by_torch() else REAL_DEVICE("cuda", self.rehearsed_index)


class Generator(metaclass=_GeneratorMeta):
    """Stands for ``torch.Generator``: ``Generator(device="cuda")`` is one of the CPU's that says it is CUDA's."""

    def __new__(cls, device: Any = None) -> Any:
        index = cuda_index(device)
        if index is None:
            return _REAL_GENERATOR() if device is None else _REAL_GENERATOR(device)
        made = _CudaGenerator()
        made.rehearsed_index = index
        return made


Generator.__qualname__ = "Generator"
Generator.__module__ = "torch"


def replace_random() -> None:
    """Replace ``torch.Generator``, and show one default generator for each device."""
    replace(torch, "Generator", Generator)
    made = []
    for index in range(count()):
        generator = _GENERATORS[index] = _CudaGenerator()
        generator.rehearsed_index = index
        made.append(generator)
    torch.cuda.default_generators = tuple(made)  # type: ignore[assignment]
