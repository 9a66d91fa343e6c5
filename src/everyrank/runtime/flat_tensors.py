"""Many tensors in few messages: flat buckets, and sending rank 0's tensors to all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Few messages, and little memory beside the model.
_BUCKET_BYTES = 64 << 20


def send_from_main(tensors: Sequence[Tensor]) -> None:
    """Give every rank rank 0's tensors. Collective; nothing at world size 1."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        # As bytes, so that tensors of all types travel in one message.
        for bucket in flat_buckets([(tensor.contiguous().view(-1).view(torch.uint8), tensor) for tensor in tensors]):
            sizes = [data.numel() for data, _ in bucket]
            flat = torch.cat([data for data, _ in bucket])
            dist.broadcast(flat, src=0)
            for (_, tensor), sent in zip(bucket, flat.split(sizes), strict=True):
                # A copy: a part may begin where its type may not.
                tensor.copy_(sent.clone().view(tensor.dtype).view(tensor.shape))


def flat_buckets(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield pairs of tensors whose first ones can be put into one flat tensor, up to a size, in a fixed order."""
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        kinds.setdefault((pair[0].dtype, pair[0].device), []).append(pair)
    for kind in kinds.values():
        bucket: list[tuple[Tensor, Tensor]] = []
        num_bytes = 0
        for pair in kind:
            if bucket and num_bytes + pair[0].nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(pair)
            num_bytes += pair[0].nbytes
        yield bucket


def split_flat(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a flat tensor, shaped as the tensors it was made of."""
    parts = flat.split([as_real(tensor).numel() for tensor in like])
    return [
        torch.view_as_complex(part.view(*tensor.shape, 2)) if tensor.is_complex() else part.view(tensor.shape)
        for part, tensor in zip(parts, like, strict=True)
    ]


def as_real(tensor: Tensor) -> Tensor:
    """Return a tensor of a type that every backend sends."""
    if tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
