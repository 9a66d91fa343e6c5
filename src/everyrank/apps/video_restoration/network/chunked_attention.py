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
        ctx.regions, ctx.scale = regions, scale
        scaled, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
        out, log_sum = torch.empty_like(scaled), scaled.new_empty((*scaled.shape[:-1], 1))
        for at, mask in _parts(scaled, regions):
            scores = torch.matmul(scaled[at], k[at].transpose(-1, -2))
            extra = _extra(bias, mask)
            if extra is not None:
                scores += extra
            top = scores.amax(-1, keepdim=True)
            total = scores.sub_(top).exp_().sum(-1, keepdim=True)
            out[at] = torch.matmul(scores, v[at]).div_(total)
            log_sum[at] = total.log_().add_(top)
        ctx.save_for_backward(scaled, k, v, bias, out, log_sum)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled, k, v, bias, out, log_sum = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = (torch.empty_like(t) for t in (scaled, k, v))
        dbias = None if bias is None else torch.zeros_like(bias)
        # What softmax and its derivative subtract from a row rides along as one more channel of the products:
        # weights = exp(q k - log_sum), dscores = weights (grad v - grad out).
        one = torch.ones_like(log_sum)
        q_row, k_row = torch.cat((scaled, -log_sum), -1), torch.cat((k, one), -1)
        grad_row, v_row = torch.cat((grad, -(grad * out).sum(-1, keepdim=True)), -1), torch.cat((v, one), -1)
        for at, mask in _parts(scaled, ctx.regions):
            weights = torch.matmul(q_row[at], k_row[at].transpose(-1, -2))
            extra = _extra(bias, mask)
            if extra is not None:
                weights += extra
            weights.exp_()
            dscores = torch.matmul(grad_row[at], v_row[at].transpose(-1, -2)).mul_(weights)
            if dbias is not None:
                dbias += dscores.sum((0, 1, 2, 3))
            dq[at] = torch.matmul(dscores, k[at]).mul_(ctx.scale)
            # (channels x tokens) products are twice as fast as (tokens x tokens transposed) ones
            dk[at] = torch.matmul(scaled[at].transpose(-1, -2), dscores).transpose(-1, -2)
            dv[at] = torch.matmul(grad[at].transpose(-1, -2), weights).transpose(-1, -2)
        return dq, dk, dv, dbias, None, None
