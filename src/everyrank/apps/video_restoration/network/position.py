"""Where a token is: relative positions for self-attention, sine codes for mutual attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_index(window: tuple[int, int, int]) -> Tensor:
    """Return, for each pair of tokens of a window, the row of the bias table: (tokens, tokens), int64.

    Token order is (d, h, w); along each axis the difference runs from ``-(size - 1)`` to ``size - 1`` (Video Swin,
    arXiv 2106.13230, section 3.2). Because d varies slowest, the leading block of the table also serves a window that
    was shortened in time.
    """
    coords = torch.stack(torch.meshgrid(*(torch.arange(s) for s in window), indexing="ij")).flatten(1)
    difference = coords[:, :, None] - coords[:, None, :]
    index = torch.zeros_like(difference[0])
    for axis, size in enumerate(window):
        index = index * (2 * size - 1) + difference[axis] + size - 1
    return index


def sine_code(height: int, width: int, channels: int, temperature: float = 10000.0) -> Tensor:
    """Return the 2-D sine position code of DETR (arXiv 2005.12872, appendix A.4): (1, height * width, channels).

    Positions are scaled to (0, 2 pi]; the first half of the channels codes y, the second x.
    """
    half = channels // 2
    frequency = temperature ** (2 * (torch.arange(half) // 2) / half)

    def code(length: int) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32)
        phase = (position / (length + 1e-6) * 2 * math.pi).unsqueeze(1) / frequency
        return torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), dim=2).flatten(1)

    y = code(height).unsqueeze(1).expand(height, width, half)
    x = code(width).unsqueeze(0).expand(height, width, half)
    return torch.cat((y, x), dim=2).reshape(1, height * width, channels)
