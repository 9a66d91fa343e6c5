"""Which CUDA device a tensor is on, as the program sees it.

The mark is kept by the tensor's storage: views, ``detach``, ``.data`` and ``nn.Parameter`` share it and so agree, as
they do about a real device. A result of an operation has a new storage and no mark: it reads as being on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch

_MARK, _PINNED = "rehearsed_index", "rehearsed_pinned"


def claim(tensor: Any, index: int) -> Any:
    """Mark a tensor as being on ``cuda:index``, and return it."""
    setattr(_holder(tensor), _MARK, index)
    return tensor


def claimed(tensor: Any) -> int | None:
    """The index of the CUDA device that a tensor was put on, or None."""
    return getattr(_holder(tensor), _MARK, None)


def pin(tensor: Any) -> Any:
    """Mark a tensor as pinned, and return it."""
    setattr(_holder(tensor), _PINNED, True)
    return tensor


def pinned(tensor: Any) -> bool:
    """Whether a tensor was pinned."""
    return getattr(_holder(tensor), _PINNED, False)


def _holder(tensor: Any) -> Any:
    """What carries a tensor's mark: its storage, a DTensor's local shard, itself if it has none (sparse)."""
    local = getattr(tensor, "_local_tensor", None)
    if isinstance(local, torch.Tensor):
        return _holder(local)
    if isinstance(tensor, torch.UntypedStorage):
        return tensor
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return tensor
