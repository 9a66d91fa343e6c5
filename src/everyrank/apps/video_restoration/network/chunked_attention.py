"""Attention in windows for training on the CPU, without keeping the scores.

PyTorch's fused CPU kernel gives no gradient for an additive bias, and the unfused path stores (windows, heads, tokens,
tokens) numbers several times over. Here the forward pass stores the inputs alone; the backward pass computes the scores
again, a few windows at a time, so that they stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 20  # scores alive at a time: 4 MiB of float32
LOG2_E = math.log2(math.e)

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


def _in_bits(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What is added to the scores, for powers of two instead of e."""
    if bias is None or mask is None:
        extra = mask if bias is None else bias
    else:
        extra = bias + mask
    return None if extra is None else extra * LOG2_E


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, regions: list[Region], scale: float
    ) -> Tensor:
        regions = [(where, _in_bits(bias, None if mask is None else mask.to(q.dtype))) for where, mask in regions]
        ctx.regions, ctx.scale, ctx.has_bias = regions, scale, bias is not None
        scaled, k_t = (q * (scale * LOG2_E)).contiguous(), k.mT.contiguous()
        v_t = torch.cat((v.mT, torch.ones_like(v[..., :1]).mT), -2)
        out, log_sum = torch.empty_like(scaled), scaled.new_empty((*scaled.shape[:-1], 1))
        for at, extra in _parts(scaled, regions):
            scores = torch.matmul(scaled[at], k_t[at])
            if extra is not None:
                scores += extra
            top = scores.amax(-1, keepdim=True)
            weighted = torch.matmul(v_t[at], scores.sub_(top).exp2_().mT)
            total = weighted[..., -1:, :]
            out[at] = weighted[..., :-1, :].div_(total).mT
            log_sum[at] = total.log2_().mT.add_(top)
        ctx.save_for_backward(scaled, k_t, v_t, out, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, k_t, v_t, out, log_sum = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(grad) for _ in range(3))
        dbias = grad.new_zeros(grad.shape[4:6] + grad.shape[5:6]) if ctx.has_bias else None
        # What softmax and its derivative subtract from a row rides along as one more channel of the products:
        # weights = 2 ** (q k - log_sum), dscores = weights (grad v - grad out).
        grad_row = torch.cat((grad, -(grad * out).sum(-1, keepdim=True)), -1)
        q_row, k_row = torch.cat((scaled, -log_sum), -1), torch.cat((k_t, v_t[..., -1:, :]), -2)
        q_t, grad_t = scaled.mT.contiguous(), grad.mT.contiguous()
        for at, extra in _parts(scaled, ctx.regions):
            weights = torch.matmul(q_row[at], k_row[at])
            if extra is not None:
                weights += extra
            weights.exp2_()
            dscores = torch.matmul(grad_row[at], v_t[at]).mul_(weights)
            if dbias is not None:
                dbias += dscores.sum((0, 1, 2, 3))
            dq[at] = torch.matmul(k_t[at], dscores.mT).mul_(ctx.scale).mT
            dk[at] = torch.matmul(q_t[at], dscores).mul_(1 / LOG2_E).mT
            dv[at] = torch.matmul(grad_t[at], weights).mT
        return dq, dk, dv, dbias, None, None
