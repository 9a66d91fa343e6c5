"""Attention in windows for training on the CPU, without keeping the scores.

PyTorch's fused CPU kernel gives no gradient for an additive bias, and the unfused path stores (windows, heads, tokens,
tokens) numbers several times over. Here the forward pass stores the inputs alone; the backward pass computes the scores
again, a few windows at a time, so that they stay in the cache.

What counts is the time per score, and four things decide it:

- Scores lie in two buffers that are used again and again: fresh memory costs more than the product that fills it.
- (tokens x tokens) matrices are multiplied from the left, by (channels x tokens) ones: four times as fast as from the
  right by (tokens x channels), the channels of a head being few.
- Scores that are all small, as they nearly always are, need not be shifted by the largest of their row.
- Softmax is computed with powers of two. ``exp`` of a masked score falls into denormal numbers, where vector libraries
  are 20 times slower; ``exp2`` takes twice as long there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 1 << 19  # scores alive at a time: 2 MiB of float32
SMALL = 90.0  # bits; sums of powers of two up to this, and down to its reciprocal, are safe in float32 without a shift
LOG2_E = math.log2(math.e)

Region = tuple[tuple[slice, slice, slice], Tensor | None]


# The compiler would unroll the loop over chunks. torch.compiler.disable would import it here, two seconds' work.
@torch._disable_dynamo
def chunked_attention(
    qkv: Tensor, bias: Tensor | None, regions: list[Region], scale: float, *, frames: int = 1
) -> Tensor:
    """``softmax(scale * q k^T + bias + mask) v`` in every window.

    Args:
        qkv: Queries, keys and values (B, nD, nH, nW, tokens, 3, heads, head_dim).
        bias: (heads, tokens, tokens) for all windows, gets a gradient; or None.
        regions: Groups of windows and their masks, see ``WindowGrid.regions``.
        scale: Factor on the scores.
        frames: 1 for self-attention. 2 for mutual attention of a window's two frames: the second asks the first, whose
            answer stands at the first one's place, and the other way round.

    Returns:
        (B, nD, nH, nW, tokens, heads, head_dim).
    """
    return _ChunkedAttention.apply(qkv, bias, regions, scale, frames)


class _Plan:
    """How the windows are gone through: a unit is one window, frame and head, in the order of ``_columns``."""

    def __init__(self, shape: torch.Size, frames: int, regions: list[tuple[tuple[slice, ...], Tensor | None]]) -> None:
        batch, *counts, tokens, _, heads, _ = shape
        self.frames, self.heads, self.tokens = frames, heads, tokens // frames
        label = torch.empty(counts, dtype=torch.long)
        for number, (where, _) in enumerate(regions):
            label[where] = number
        numbers, lengths = torch.unique_consecutive(label.flatten().repeat(batch), return_counts=True)
        units = frames * heads
        ends = (lengths.cumsum(0) * units).tolist()
        runs = [
            (start, end, regions[number][1])
            for number, start, end in zip(numbers.tolist(), [0, *ends], ends, strict=False)
        ]
        self.step = min(ends[-1], units * max(1, CHUNK_NUMBERS // (units * self.tokens**2)))
        # for each chunk, which of its units get which addition; all of them, or there is none
        self.extras = [
            [
                (slice(max(start - first, 0), min(end - first, self.step)), extra)
                for start, end, extra in runs
                if start < first + self.step and end > first
            ]
            for first in range(0, ends[-1], self.step)
        ]
        self.extras = [parts if any(e is not None for _, e in parts) else [] for parts in self.extras]

    def scores(self, like: Tensor) -> Tensor:
        """Return memory for the scores of a chunk."""
        return like.new_empty(self.step, self.tokens, self.tokens)

    def chunks(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield, chunk by chunk, its additions and its part of each of ``tensors`` (units, ...)."""
        return zip(self.extras, *(t.split(self.step) for t in tensors), strict=True)


def _scores(q: Tensor, k: Tensor, extras: list[tuple[slice, Tensor | None]], memory: Tensor) -> Tensor:
    """Return ``q k`` plus position bias and masks, (units, tokens, tokens), in ``memory``."""
    scores = memory[: len(q)]
    if not extras:
        return torch.bmm(q, k, out=scores)
    for part, extra in extras:
        if extra is None:
            scores[part].zero_()
        else:
            scores[part].unflatten(0, (-1, len(extra))).copy_(extra)
    return scores.baddbmm_(q, k)


def _columns(x: Tensor, frames: int, factor: float = 1.0, *, swap: bool = False) -> Tensor:
    """(B, nD, nH, nW, tokens, heads, head_dim) to (windows, frames and heads, head_dim + 1, tokens of a frame).

    Contiguous: products of other views take five times as long. The last channel is ones.
    """
    x = _by_channel(x, frames, swap=swap)
    *lead, channels, tokens = x.shape
    found = x.new_empty(*lead, channels + 1, tokens)
    torch.mul(x, factor, out=found[..., :channels, :])
    found[..., channels, :] = 1.0
    return found.view(-1, channels + 1, tokens)


def _put(columns: Tensor, x: Tensor, frames: int, factor: float = 1.0, *, swap: bool = False) -> None:
    """Undo :func:`_columns` for ``columns`` without the last channel: write them, times ``factor``, to ``x``."""
    x = _by_channel(x, frames)
    columns = columns.view(x.shape)
    torch.mul(columns.flip(4) if swap else columns, factor, out=x)


def _by_channel(x: Tensor, frames: int, *, swap: bool = False) -> Tensor:
    x = x.unflatten(4, (frames, -1))
    return (x.flip(4) if swap else x).permute(0, 1, 2, 3, 4, 6, 7, 5)


def _in_bits(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, for powers of two instead of e: (heads or 1, tokens, tokens)."""
    if mask is None:
        return None if bias is None else bias * LOG2_E
    mask = mask.to(dtype).unsqueeze(0) * LOG2_E
    return mask if bias is None else mask + bias * LOG2_E


def _bound(q: Tensor, k: Tensor, bias: Tensor | None) -> float:
    """What no score exceeds, in bits; masks only lower them."""
    bound = q.shape[1] * _largest(q) * _largest(k)
    return bound if bias is None else bound + _largest(bias) * LOG2_E


def _largest(x: Tensor) -> float:
    low, high = torch.aminmax(x)
    return max(-low.item(), high.item())


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, regions: list[Region], scale: float, frames: int) -> Tensor:
        plan = _Plan(qkv.shape, frames, [(where, _in_bits(bias, mask, qkv.dtype)) for where, mask in regions])
        q, k, v = qkv.unbind(5)
        queries = _columns(q, frames, scale * LOG2_E, swap=frames > 1)
        keys, values = _columns(k, frames), _columns(v, frames)
        found, tops = torch.empty_like(values), torch.zeros_like(values[:, :1])
        small = _bound(queries[:, :-1], keys[:, :-1], bias) <= SMALL
        memory = plan.scores(qkv)
        for extras, q, k, v, answer, top in plan.chunks(queries[:, :-1].mT, keys[:, :-1], values, found, tops.mT):
            scores = _scores(q, k, extras, memory)
            if not small:
                scores -= torch.amax(scores, -1, keepdim=True, out=top)
            torch.bmm(v, scores.exp2_().mT, out=answer)
        # The ones among the values have summed the weights.
        total = found[:, -1:].contiguous()  # of other views, log2 takes ten times as long
        answers = found[:, :-1] / total
        queries[:, -1:] = total.log2_().add_(tops).neg_()
        out = qkv.new_empty(*qkv.shape[:5], *qkv.shape[6:])
        _put(answers, out, frames)
        ctx.save_for_backward(queries, keys, values, answers)
        ctx.plan, ctx.scale, ctx.has_bias, ctx.shape = plan, scale, bias is not None, qkv.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan: _Plan = ctx.plan
        queries, keys, values, answers = ctx.saved_tensors
        # What softmax and its derivative subtract from a row rides along as the last channel of the products:
        # weights = 2 ** (q k - log_sum), dscores = weights (grad v - grad answer).
        grads = _columns(grad, plan.frames)
        torch.sum(grads[:, :-1] * answers, 1, out=grads[:, -1]).neg_()
        dqueries, dkeys, dvalues = (torch.empty_like(answers) for _ in range(3))
        dbias = grad.new_zeros(plan.heads, plan.tokens, plan.tokens) if ctx.has_bias else None
        memory, more_memory = plan.scores(grad), plan.scores(grad)
        parts = queries, keys, values, grads, queries[:, :-1], keys[:, :-1], grads[:, :-1], dqueries, dkeys, dvalues
        for extras, q_row, k_row, v_row, grad_row, q, k, g, dq, dk, dv in plan.chunks(*parts):
            weights = _scores(q_row.mT, k_row, extras, memory).exp2_()
            torch.bmm(g, weights, out=dv)
            dscores = torch.bmm(grad_row.mT, v_row, out=more_memory[: len(q)]).mul_(weights)
            torch.bmm(k, dscores.mT, out=dq)
            torch.bmm(q, dscores, out=dk)
            if dbias is not None:
                windows = dscores.view(-1, dbias.numel())
                dbias.view(1, -1).addmm_(windows.new_ones(1, len(windows)), windows)
        dqkv = grad.new_empty(ctx.shape)
        dq, dk, dv = dqkv.unbind(5)
        _put(dqueries, dq, plan.frames, ctx.scale, swap=plan.frames > 1)
        _put(dkeys, dk, plan.frames, 1 / LOG2_E)
        _put(dvalues, dv, plan.frames)
        return dqkv, dbias, None, None, None
