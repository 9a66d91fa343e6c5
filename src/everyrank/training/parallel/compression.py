"""Gradients in a narrow type on the wire: communication hooks for DDP.

As torch's ``bf16_compress_hook`` and ``fp16_compress_hook``, which divide before they send so that the sum over many
ranks stays in range; but torch lets its bfloat16 hook be registered with NCCL only, while gloo can add bfloat16 too.
"""

# No postponed annotations in this file: DDP compares the annotation of `bucket` with the class itself.

from typing import Any

import torch
import torch.distributed as dist


def narrow_mean(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over the ranks in a type: the hook that DDP is given, with that as its state."""
    full = bucket.buffer()
    narrow = full.to(dtype).div_(dist.get_world_size())
    work = dist.all_reduce(narrow, async_op=True)
    assert work is not None

    def widen(future: torch.futures.Future[Any]) -> torch.Tensor:
        value = future.value()
        full.copy_(value[0] if isinstance(value, list) else value)
        return full

    return work.get_future().then(widen)
