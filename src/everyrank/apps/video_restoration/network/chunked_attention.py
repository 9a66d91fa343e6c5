"""Attention in windows for training on the CPU, without keeping the scores.

PyTorch's fused CPU kernel gives no gradient for an additive bias, and the unfused path stores (windows, heads, tokens,
tokens) numbers several times over. Here the forward pass stores the inputs alone; the backward pass computes the scores
again, a few windows at a time, so that they stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 20  # scores alive at a time: 4 MiB of float32

Region = tuple[tuple[slice, slice, slice], Tensor | None]


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, regions: list[Region], scale: float
) -> Tensor:
    """``softmax(scale * q k^T + bias + mask) v`` in every window.

    Args:
        q: Queries (B, nD, nH, nW, heads, tokens, head_dim).
        k: Keys, likewise.
        v: Values, likewise.
        bias: (heads, tokens, tokens) for all windows, gets a gradient; or None.
        regions: Groups of windows and their masks, see ``WindowGrid.regions``.
        scale: Factor on the scores.

    Returns:
        The shape of ``q``.
    """
    return _ChunkedAttention.apply(q, k, v, bias, regions, scale)


def _parts(x: Tensor, regions: list[Region]) -> Iterator[tuple[tuple[slice, ...], Tensor | None]]:
    """Yield where the windows of each part are, and the part's mask; a part lies in one region and one clip."""
    heads, tokens = x.shape[4:6]
    rows = max(1, CHUNK_NUMBERS // (heads * tokens * tokens * max(1, x.shape[3])))
    for (d, h, w), mask in regions:
        top, bottom, _ = h.indices(x.shape[2])
        for sample in range(x.shape[0]):
            for depth in range(*d.indices(x.shape[1])):
                for row in range(top, bottom, rows):
                    where = (slice(sample, sample + 1), slice(depth, depth + 1), slice(row, min(row + rows, bottom)), w)
                    yield where, mask


def _weights(q: Tensor, k: Tensor, extra: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the scaled queries and the attention weights of a part."""
    scaled = q * scale
    scores = torch.matmul(scaled, k.transpose(-1, -2))
    if extra is not None:
        scores += extra
    return scaled, torch.softmax(scores, dim=-1)


def _extra(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias + mask


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, regions: list[Region], scale: float
    ) -> Tensor:
        if bias is not None:
            bias = bias.contiguous()
        regions = [(where, None if mask is None else mask.to(q.dtype)) for where, mask in regions]
        ctx.save_for_backward(q, k, v, bias)
        ctx.regions, ctx.scale = regions, scale
        out = q.new_empty(q.shape)
        for at, mask in _parts(q, regions):
            out[at] = torch.matmul(_weights(q[at], k[at], _extra(bias, mask), scale)[1], v[at])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
        dbias = None if bias is None else torch.zeros_like(bias)
        for at, mask in _parts(q, ctx.regions):
            keys, upper = k[at], grad[at]
            scaled, weights = _weights(q[at], keys, _extra(bias, mask), ctx.scale)
            dv[at] = torch.matmul(weights.transpose(-1, -2), upper)
            dweights = torch.matmul(upper, v[at].transpose(-1, -2))
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            if dbias is not None:
                dbias += dscores.sum((0, 1, 2, 3))
            dq[at] = torch.matmul(dscores, keys).mul_(ctx.scale)
            dk[at] = torch.matmul(dscores.transpose(-1, -2), scaled)
        return dq, dk, dv, dbias, None, None
