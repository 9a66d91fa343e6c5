"""Flow-guided deformable convolution for the CPU, a few frames at a time.

PyTorch has no deformable convolution of its own. Made of its operations, the offsets, the samples of all taps, their
coordinates and the gradients of all these are many times what the whole layer takes in. Here they are made a few frames
at a time, in the cache, and the backward pass is written by hand. For training, offsets, coordinates and samples are
kept, which is faster than to make them again; for inference nothing is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

CHUNK_NUMBERS = 1 << 19  # samples made at a time: 2 MiB of float32


# The compiler would unroll the loop over chunks. torch.compiler.disable would import it here, two seconds' work.
@torch._disable_dynamo
def chunked_deform(
    features: Tensor,
    sources: Tensor,
    guide: Tensor,
    offset_weight: Tensor,
    offset_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    max_residue: float,
) -> Tensor:
    """Convolve ``sources`` where the flows point, plus offsets: modulated deformable convolution (arXiv 1811.11168).

    ``raw``, the 3x3 convolution of ``features``, has 3 * groups * k * k channels. Two thirds are offsets in pairs
    (dy, dx), as ``max_residue * tanh(raw)`` from where the flow points, shared out to the neighbours in order; one
    third are factors on the samples, as ``sigmoid(raw)``. Both go by deformable group, then by tap of the kernel.

    Args:
        features: What the offsets are made of (N, F, H, W).
        sources: Features that are sampled (N, neighbours * C, H, W).
        guide: Flows (N, 2 * neighbours, H, W) in pairs (dx, dy).
        offset_weight: (3 * groups * k * k, F, 3, 3).
        offset_bias: (3 * groups * k * k,).
        weight: (out, C, k, k).
        bias: (out,).
        max_residue: In pixels.

    Returns:
        (N, out, H, W).
    """
    keep = torch.is_grad_enabled()  # never so inside
    return _ChunkedDeform.apply(features, sources, guide, offset_weight, offset_bias, weight, bias, max_residue, keep)


class _Layout:
    """The sizes of one call, and where its samples are taken."""

    def __init__(self, sources: Tensor, guide: Tensor, num_raw: int, weight: Tensor, max_residue: float) -> None:
        self.channels, self.height, self.width = sources.shape[1:]
        kernel = weight.shape[-1]
        self.taps = kernel**2
        self.groups = num_raw // (3 * self.taps)
        self.num_offsets = 2 * self.groups * self.taps
        self.neighbours = guide.shape[1] // 2
        self.conv_groups = self.channels // weight.shape[1]
        self.step = max(1, CHUNK_NUMBERS // (self.channels * self.taps * self.height * self.width))
        # grid_sample's units: a frame is two wide and two high
        self.per_pixel = sources.new_tensor([2.0 / max(size - 1, 1) for size in (self.width, self.height)])
        # tanh(x) = 2 sigmoid(2 x) - 1, and sigmoid is six times as fast
        self.inner = sources.new_ones(num_raw, 1)
        self.inner[: self.num_offsets] = 2.0
        self.outer = sources.new_ones(num_raw, 1)
        self.outer[: self.num_offsets].view(-1, 2).copy_(2.0 * max_residue * self.per_pixel.flip(0))
        tap = torch.arange(self.groups * self.taps // self.neighbours, device=sources.device) % self.taps
        x, y = (torch.arange(size, device=sources.device, dtype=sources.dtype) for size in (self.width, self.height))
        places = (x.view(1, 1, -1), (tap % kernel).view(-1, 1, 1)), (y.view(1, -1, 1), (tap // kernel).view(-1, 1, 1))
        self.starts = [
            (pixel + shift - kernel // 2 - max_residue) * unit - 1.0
            for (pixel, shift), unit in zip(places, self.per_pixel, strict=True)
        ]
        self.reach = (2.0 * max_residue * self.per_pixel).tolist()

    def pairs(self, x: Tensor) -> Tensor:
        """View what is there for offsets as (n, neighbours, share, 2, H, W)."""
        return x[:, : self.num_offsets].view(x.shape[0], self.neighbours, -1, 2, self.height, self.width)

    def factors(self, x: Tensor) -> Tensor:
        """View what is there for factors as (n, groups, 1, taps, H * W)."""
        return x[:, self.num_offsets :].view(x.shape[0], self.groups, 1, self.taps, self.height * self.width)

    def grouped(self, x: Tensor) -> Tensor:
        """View samples as (n, groups, channels of a group, taps, H * W)."""
        return x.view(-1, self.groups, self.channels // self.groups, self.taps, self.height * self.width)

    def columns(self, samples: Tensor) -> Tensor:
        """View samples as (n, conv_groups, inputs of an output, H * W)."""
        inputs = self.channels // self.conv_groups * self.taps
        return samples.view(-1, self.conv_groups, inputs, self.height * self.width)

    def values(self, sources: Tensor) -> Tensor:
        """View sources as the frames that are sampled: (n * groups, channels of a group, H, W)."""
        return sources.reshape(-1, self.channels // self.groups, self.height, self.width)

    def grid(self, active: Tensor, guide: Tensor) -> Tensor:
        """Return (n * groups, taps * H, W, 2) for ``grid_sample``."""
        residue, flow = self.pairs(active), guide.unflatten(1, (self.neighbours, 1, 2))
        found = active.new_empty(*residue.shape[:3], self.height, self.width, 2)
        for axis in (0, 1):
            start = torch.addcmul(self.starts[axis], flow[:, :, :, axis], self.per_pixel[axis])
            torch.add(start, residue[:, :, :, 1 - axis], alpha=self.reach[axis], out=found[..., axis])
        return found.view(-1, self.taps * self.height, self.width, 2)


class _ChunkedDeform(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        features: Tensor,
        sources: Tensor,
        guide: Tensor,
        offset_weight: Tensor,
        offset_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
        max_residue: float,
        keep: bool,
    ) -> Tensor:
        layout = _Layout(sources, guide, len(offset_weight), weight, max_residue)
        offset_kernel, offset_start = offset_weight.flatten(1) * layout.inner, offset_bias.unsqueeze(1) * layout.inner
        kernel = weight.view(layout.conv_groups, weight.shape[0] // layout.conv_groups, -1)
        out = sources.new_empty(len(sources), *kernel.shape[:2], layout.height * layout.width)
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(sources), layout.step):
            part = slice(start, start + layout.step)
            active = torch.matmul(offset_kernel, F.unfold(features[part], 3, padding=1)).add_(offset_start).sigmoid_()
            grid = layout.grid(active, guide[part])
            samples = layout.grouped(aten.grid_sampler_2d(layout.values(sources[part]), grid, 0, 0, True))
            torch.matmul(kernel, layout.columns(samples * layout.factors(active)), out=out[part])
            if keep:
                kept.append((active, grid, samples))
        ctx.save_for_backward(features, sources, guide, offset_weight, weight, *(t for part in kept for t in part))
        ctx.max_residue = max_residue
        return out.view(-1, weight.shape[0], layout.height, layout.width).add_(bias.view(-1, 1, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        features, sources, guide, offset_weight, weight, *kept = ctx.saved_tensors
        layout = _Layout(sources, guide, len(offset_weight), weight, ctx.max_residue)
        # what stands before and after the sigmoid, for each raw channel
        scale = layout.inner * layout.outer
        offset_kernel = offset_weight.flatten(1) * scale
        kernel = weight.view(layout.conv_groups, weight.shape[0] // layout.conv_groups, -1)
        dfeatures, dsources, dguide = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (features, sources, guide)
        )
        doffset_kernel, dkernel = torch.zeros_like(offset_kernel), torch.zeros_like(kernel)
        doffset_bias = torch.zeros_like(scale)
        per_output = grad.reshape(len(grad), *kernel.shape[:2], -1)
        starts = range(0, len(sources), layout.step)
        for start, active, grid, samples in zip(starts, kept[::3], kept[1::3], kept[2::3], strict=True):
            part = slice(start, start + layout.step)
            values, factors = layout.values(sources[part]), layout.factors(active)
            dactive = torch.empty_like(active)
            dcolumns = layout.grouped(torch.matmul(kernel.mT, per_output[part]))
            dfactors = (samples * dcolumns).sum(2, keepdim=True)
            aten.sigmoid_backward(dfactors, factors, grad_input=layout.factors(dactive))
            dkernel += torch.matmul(per_output[part], layout.columns(samples * factors).mT).sum(0)
            dcolumns *= factors
            dvalues, dgrid = aten.grid_sampler_2d_backward(
                dcolumns.view(*values.shape[:2], *grid.shape[1:3]), values, grid, 0, 0, True, (True, True)
            )
            dsources[part] = dvalues.view_as(dsources[part])
            residue, dresidue = layout.pairs(active), layout.pairs(dactive)
            dflow = dguide[part].unflatten(1, (layout.neighbours, 2))
            dgrid = dgrid.view(*residue.shape[:3], layout.height, layout.width, 2)
            for axis in (0, 1):
                torch.sum(dgrid[..., axis], 2, out=dflow[:, :, axis]).mul_(layout.per_pixel[axis])
                at = (slice(None), slice(None), slice(None), 1 - axis)
                aten.sigmoid_backward(dgrid[..., axis], residue[at], grad_input=dresidue[at])
            around = F.unfold(features[part], 3, padding=1)
            doffset_kernel += torch.matmul(dactive, around.mT).sum(0)
            doffset_bias += dactive.sum((0, 2)).unsqueeze(1)
            daround = torch.matmul(offset_kernel.mT, dactive)
            dfeatures[part] = F.fold(daround, (layout.height, layout.width), 3, padding=1)
        doffset_weight = (doffset_kernel * scale).view_as(offset_weight)
        doffset_bias = (doffset_bias * scale).squeeze(1)
        dweight, dbias = dkernel.view_as(weight), grad.sum((0, 2, 3))
        return dfeatures, dsources, dguide, doffset_weight, doffset_bias, dweight, dbias, None, None
