"""Attention with a trainable bias on the CPU, without keeping the scores.

PyTorch's fused CPU kernel gives no gradient for an additive bias; the unfused path stores (windows, heads, tokens,
tokens) numbers several times over. Here the forward pass stores the inputs alone; the backward pass computes the
scores again, a few windows at a time, so that they stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_NUMBERS = 1 << 20  # scores alive at a time: 4 MiB of float32


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q k^T + bias) v`` for q, k, v (windows, heads, tokens, head_dim) and one bias for all.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        bias: (heads, tokens, tokens), gets a gradient.
        scale: Factor on the scores.

    Returns:
        (windows, heads, tokens, head_dim).
    """
    return _ChunkedAttention.apply(q, k, v, bias, scale)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        q, k, v, bias = q.contiguous(), k.contiguous(), v.contiguous(), bias.contiguous()
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0), scale=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dbias = torch.zeros_like(bias)
        heads, tokens = q.shape[1:3]
        step = max(1, CHUNK_NUMBERS // (heads * tokens * tokens))
        grad = grad.contiguous()
        for start in range(0, q.shape[0], step):
            part = slice(start, start + step)
            scaled = q[part] * ctx.scale
            weights = torch.softmax(torch.matmul(scaled, k[part].transpose(-1, -2)).add_(bias), dim=-1)
            dv[part] = torch.matmul(weights.transpose(-1, -2), grad[part])
            dweights = torch.matmul(grad[part], v[part].transpose(-1, -2))
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dbias += dscores.sum(0)
            dq[part] = torch.matmul(dscores, k[part]).mul_(ctx.scale)
            dk[part] = torch.matmul(dscores.transpose(-1, -2), scaled)
        return dq, dk, dv, dbias, None
