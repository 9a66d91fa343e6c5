"""Computing a batch in parts and again in the backward pass: memory of one part instead of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def in_parts(function: Callable[..., Tensor], batched: Sequence[Tensor], shared: Sequence[Tensor], step: int) -> Tensor:
    """Return ``function(*batched, *shared)``, computed for ``step`` samples at a time.

    Nothing inside ``function`` is kept for the backward pass, which computes each part again.

    Args:
        function: Treats the samples of a batch independently.
        batched: Tensors whose first dimension is the batch.
        shared: Tensors that all samples use, such as weights.
        step: Samples of one part.
    """
    return _InParts.apply(function, step, len(batched), *batched, *shared)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], step: int, num_batched: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.step, ctx.num_batched = function, step, num_batched
        batched, shared = tensors[:num_batched], tensors[num_batched:]
        return torch.cat([function(*part, *shared) for part in zip(*(t.split(step) for t in batched), strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        num_batched, needed = ctx.num_batched, ctx.needs_input_grad[3:]
        tensors = ctx.saved_tensors
        grads = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)]
        for start in range(0, grad.shape[0], ctx.step):
            part = slice(start, start + ctx.step)
            pieces = [t[part] if i < num_batched else t for i, t in enumerate(tensors)]
            leaves = [p.detach().requires_grad_(need) for p, need in zip(pieces, needed, strict=True)]
            with torch.enable_grad():
                out = ctx.function(*leaves)
            found = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad[part]))
            for i, total in enumerate(grads):
                if total is not None:
                    (total[part] if i < num_batched else total).add_(next(found))
        return (None, None, None, *grads)
