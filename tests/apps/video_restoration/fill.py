"""The rule that gives a VRT its test weights: every floating parameter is drawn from a generator seeded with the
CRC-32 of its own name, so that a few kilobytes pin a whole network."""

import zlib

import torch

DERIVED = ("relative_position_index", "position_bias", "spynet.mean", "spynet.std")


def value(name, shape):
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    v = torch.randn(tuple(shape), generator=g)
    if len(shape) == 1:
        return 1 + 0.1 * v if ("norm" in name and name.endswith("weight")) or ".0.1.weight" in name else 0.02 * v
    fan_in = 1
    for s in shape[1:]:
        fan_in *= s
    return v * ((0.05 if "conv_offset.6" in name else 0.7) / fan_in**0.5)


def fill(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(value(name, p.shape))
    return module


def clip(name, shape):
    """A smooth, moving test clip in [0, 1]: (N, D, C, H, W)."""
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    n, d, c, h, w = shape
    phase = torch.rand(n, 1, c, 1, 1, generator=g) * 6.28
    t = torch.arange(d).view(1, d, 1, 1, 1)
    y = torch.arange(h).view(1, 1, 1, h, 1)
    x = torch.arange(w).view(1, 1, 1, 1, w)
    return (
        0.5
        + 0.3 * torch.sin(0.21 * (x + 1.5 * t) + phase) * torch.cos(0.17 * (y - 0.7 * t) + phase)
        + 0.05 * torch.rand(shape, generator=g)
    )
