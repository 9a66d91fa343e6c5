"""Reading: ``torch.load`` and storages onto a CUDA device, and loaders that pin."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.utils.data import dataloader

from everyrank.rehearsal.devices import cuda_index, index_or_current
from everyrank.rehearsal.marks import claim, claimed
from everyrank.rehearsal.patching import replace


def replace_loading() -> None:
    """Replace what reads onto a device."""
    replace(torch, "load", _load(torch.load))
    torch.serialization.load = torch.load
    for name in ("UntypedStorage", "TypedStorage"):
        storage: Any = getattr(torch, name)
        replace(storage, "cuda", _storage_cuda)
        replace(storage, "cpu", _storage_cpu(storage.cpu))
    base: Any = torch.storage._StorageBase
    replace(base, "clone", _storage_clone(base.clone))
    iterator: Any = dataloader._BaseDataLoaderIter
    replace(iterator, "__init__", _unpinned(iterator.__init__))


def _load(original: Any) -> Any:
    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return original(f, _location(map_location), *args, **kwargs)

    return load


def _location(asked: Any) -> Any:
    """A ``map_location`` that a CPU build can follow, and that marks what it puts on a CUDA device."""
    if isinstance(asked, dict):
        moves = {source: _location(target) for source, target in asked.items()}
        return lambda storage, tag: moves[tag](storage, tag) if callable(moves.get(tag)) else storage
    if callable(asked):
        return asked
    index = cuda_index(asked)
    if index is None:
        return asked
    return lambda storage, tag: claim(storage, index)


def _untyped(storage: Any) -> Any:
    return storage._untyped_storage if isinstance(storage, torch.TypedStorage) else storage


def _storage_cuda(storage: Any, device: Any = None, non_blocking: bool = False) -> Any:
    index = index_or_current(device)
    if claimed(_untyped(storage)) == index:
        return storage
    moved = storage.clone()
    claim(_untyped(moved), index)
    return moved


def _storage_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def cpu(storage: Any) -> Any:
        if claimed(_untyped(storage)) is None:
            return original(storage)
        moved = _BASE_CLONE(_untyped(storage))
        return moved if _untyped(storage) is storage else storage._new_wrapped_storage(moved)

    return cpu


_BASE_CLONE: Any = torch.storage._StorageBase.clone


def _storage_clone(original: Any) -> Any:
    """A copy is where the original is: ``copy.deepcopy`` of a model comes here."""

    @functools.wraps(original)
    def clone(storage: Any) -> Any:
        made, index = original(storage), claimed(storage)
        return made if index is None else claim(made, index)

    return clone


def _unpinned(original: Any) -> Any:
    """torch's loaders hear that there is no accelerator, pin nothing, and need not warn of it."""

    @functools.wraps(original)
    def init(self: Any, loader: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
            original(self, loader)

    return init
