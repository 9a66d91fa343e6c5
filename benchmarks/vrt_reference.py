"""VRT computed the straightforward way: explicit attention matrices, one frame after the other.

It runs on the parameters of an :class:`everyrank.apps.video_restoration.VRT` and shares no code with it beyond single
layers (linear, convolution, norm) and the sampling of one deformable convolution. The benchmark measures against it,
and the tests compare with it where no published output is at hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everyrank.apps.video_restoration.network.deform import sampled_deform_conv2d


def warp(x: Tensor, flow: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """Sample (N, C, H, W) where the flow (N, 2, H, W) points."""
    _, _, h, w = x.shape
    gy, gx = torch.meshgrid(torch.arange(h).to(x), torch.arange(w).to(x), indexing="ij")
    px, py = gx + flow[:, 0], gy + flow[:, 1]

    def at(qx: Tensor, qy: Tensor, how: str) -> Tensor:
        grid = torch.stack((2 * qx / max(w - 1, 1) - 1, 2 * qy / max(h - 1, 1) - 1), -1)
        return F.grid_sample(x, grid, mode=how, padding_mode=padding, align_corners=True)

    if mode == "bilinear":
        return at(px, py, mode)
    corners = [(px.floor(), py.floor()), (px.floor(), py.ceil()), (px.ceil(), py.floor()), (px.ceil(), py.ceil())]
    return torch.cat([at(a, b, "nearest") for a, b in corners], 1)


def spynet(net: nn.Module, first: Tensor, second: Tensor) -> list[Tensor]:
    """Flows at scales 1, 1/2, 1/4, 1/8."""
    h, w = first.shape[-2:]
    size = (-(-h // 32) * 32, -(-w // 32) * 32)
    ref = [(F.interpolate(first, size=size, mode="bilinear", align_corners=False) - net.mean) / net.std]
    sup = [(F.interpolate(second, size=size, mode="bilinear", align_corners=False) - net.mean) / net.std]
    for _ in range(5):
        ref.insert(0, F.avg_pool2d(ref[0], 2))
        sup.insert(0, F.avg_pool2d(sup[0], 2))
    flow = torch.zeros_like(ref[0][:, :2])
    flows = []
    for level in range(6):
        if level:
            flow = F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=True) * 2
        near = warp(sup[level], flow, padding="border")
        flow = net.basic_module[level].basic_module(torch.cat([ref[level], near, flow], 1)) + flow
        scale = 2 ** (5 - level)
        if level >= 2:
            out = F.interpolate(flow, size=(h // scale, w // scale), mode="bilinear", align_corners=False)
            ratio = torch.tensor([(w // scale) / flow.shape[-1], (h // scale) / flow.shape[-2]])
            flows.insert(0, out * ratio.to(out).view(1, 2, 1, 1))
    return flows


def all_flows(net: nn.Module, x: Tensor, reach: int) -> tuple[dict, dict]:
    """Flows keyed by (scale, from frame, to frame)."""
    flows: dict[tuple[int, int, int], Tensor] = {}
    n = x.shape[1]
    for t in range(n - 1):
        for s, flow in enumerate(spynet(net, x[:, t], x[:, t + 1])):
            flows[s, t, t + 1] = flow
        for s, flow in enumerate(spynet(net, x[:, t + 1], x[:, t])):
            flows[s, t + 1, t] = flow
    for s in range(4):
        for k in range(2, reach + 1):
            for t in range(n - k):
                near, last = flows[s, t, t + k - 1], flows[s, t + k - 1, t + k]
                flows[s, t, t + k] = near + warp(last, near)
                near, last = flows[s, t + k, t + 1], flows[s, t + 1, t]
                flows[s, t + k, t] = near + warp(last, near)
    return flows


def window_mask(size: tuple[int, ...], window: list[int], shift: list[int]) -> Tensor:
    """Masks (windows, tokens, tokens) from labelling every token of the padded clip."""
    label = torch.zeros(1, *size, 1)
    count = 0
    spans = [
        (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
        for w, s in zip(window, shift, strict=True)
    ]
    for d in spans[0]:
        for h in spans[1]:
            for w in spans[2]:
                label[:, d, h, w] = count
                count += 1
    flat = partition(label, window).squeeze(-1)
    return torch.where(flat[:, None, :] == flat[:, :, None], 0.0, -100.0)


def partition(x: Tensor, window: list[int]) -> Tensor:
    """(B, D, H, W, C) to (windows, tokens, C)."""
    b, d, h, w, c = x.shape
    x = x.view(b, d // window[0], window[0], h // window[1], window[1], w // window[2], window[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window[0] * window[1] * window[2], c)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Attention (windows, heads, tokens, head_dim) with the whole matrix in memory."""
    scores = (q * scale) @ k.transpose(-2, -1)
    n = q.shape[-2]
    if bias is not None:
        scores = scores + bias.unsqueeze(0)
    if mask is not None:
        scores = scores.view(-1, mask.shape[0], *scores.shape[1:]) + mask[:, :n, :n].unsqueeze(1).unsqueeze(0)
        scores = scores.flatten(0, 1)
    out = torch.softmax(scores, -1) @ v
    return out.transpose(1, 2).flatten(2)


def attention(attn: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Self- and mutual attention of windows (windows, tokens, C)."""
    heads, n = attn.num_heads, x.shape[1]

    def split(y: Tensor) -> Tensor:
        return y.reshape(y.shape[0], n, 3, heads, -1).permute(2, 0, 3, 1, 4)

    q, k, v = split(attn.qkv_self(x))
    index = attn.relative_position_index[:n, :n].reshape(-1)
    bias = attn.relative_position_bias_table[index].reshape(n, n, -1).permute(2, 0, 1)
    out = softmax_attention(q, k, v, attn.scale, bias, mask)
    if attn.mutual:
        q, k, v = split(attn.qkv_mut(x + attn.position_bias.repeat(1, 2, 1)))
        (q1, q2), (k1, k2), (v1, v2) = q.chunk(2, 2), k.chunk(2, 2), v.chunk(2, 2)
        first = softmax_attention(q2, k1, v1, attn.scale, None, mask)
        second = softmax_attention(q1, k2, v2, attn.scale, None, mask)
        out = torch.cat([torch.cat([first, second], 1), out], 2)
    return attn.proj(out)


def block(blk: nn.Module, x: Tensor) -> Tensor:
    """One transformer block on (B, D, H, W, C)."""
    size = x.shape[1:4]
    window = [min(w, s) for w, s in zip(blk.window, size, strict=True)]
    shift = [0 if s <= w else m for s, w, m in zip(size, blk.window, blk.shift, strict=True)]
    full = [-(-s // w) * w for s, w in zip(size, window, strict=True)]
    y = F.pad(blk.norm1(x), (0, 0, 0, full[2] - size[2], 0, full[1] - size[1], 0, full[0] - size[0]))
    mask = None
    if any(shift):
        y = torch.roll(y, [-s for s in shift], (1, 2, 3))
        mask = window_mask(tuple(full), window, shift).to(x)
    y = attention(blk.attn, partition(y, window), mask)
    counts = [f // w for f, w in zip(full, window, strict=True)]
    y = y.view(x.shape[0], *counts, *window, -1).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], *full, -1)
    if any(shift):
        y = torch.roll(y, shift, (1, 2, 3))
    x = x + y[:, : size[0], : size[1], : size[2]]
    return x + mlp(blk.mlp, blk.norm2(x))


def mlp(m: nn.Module, x: Tensor) -> Tensor:
    """Gated MLP."""
    return m.fc2(F.gelu(m.fc11(x)) * m.fc12(x))


def align(deform: nn.Module, x: Tensor, t: int, others: list[int], flows: dict, scale: int) -> Tensor:
    """Align the frames ``others`` of (B, D, C, H, W) onto frame ``t``."""
    sources, warped, guides = [], [], []
    for other in others:
        inside = 0 <= other < x.shape[1]
        source = x[:, other] if inside else torch.zeros_like(x[:, t])
        flow = flows[scale, t, other] if inside else torch.zeros_like(x[:, t, :2])
        sources.append(source)
        warped.append(warp(source, flow))
        guides.append(flow)
    raw = deform.conv_offset(torch.cat([*warped, x[:, t], *guides], 1))
    o1, o2, mask = raw.chunk(3, 1)
    offsets = list((deform.max_residue * torch.tanh(torch.cat([o1, o2], 1))).chunk(len(others), 1))
    offsets = [o + g.flip(1).repeat(1, o.shape[1] // 2, 1, 1) for o, g in zip(offsets, guides, strict=True)]
    return sampled_deform_conv2d(
        torch.cat(sources, 1), torch.cat(offsets, 1), deform.weight, deform.bias, torch.sigmoid(mask)
    )


def stage(st: nn.Module, x: Tensor, flows: dict, scale: int, reach: int) -> Tensor:
    """One scale on (B, D, H, W, C)."""
    x = st.reshape(x)
    for group, linear in ((st.residual_group1, st.linear1), (st.residual_group2, st.linear2)):
        y = x
        for blk in group.blocks:
            y = block(blk, y)
        x = linear(y) + x
    if not reach:
        return x
    f = x.permute(0, 1, 4, 2, 3)
    n = f.shape[1]
    zero = torch.zeros_like(f[:, 0])
    reaches = range(1, reach + 1)
    after = [align(st.pa_deform, f, t, [t + k for k in reaches], flows, scale) for t in range(n - 1)] + [zero]
    before = [zero] + [align(st.pa_deform, f, t, [t - k for k in reaches], flows, scale) for t in range(1, n)]
    stacked = torch.cat([f, torch.stack(after, 1), torch.stack(before, 1)], 2)
    return mlp(st.pa_fuse, stacked.permute(0, 1, 3, 4, 2))


def conv3d(conv: nn.Module, x: Tensor) -> Tensor:
    """A (1, 3, 3) convolution of (B, C, D, H, W)."""
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))


def body(net: nn.Module, x: Tensor, flows: dict) -> Tensor:
    """All stages on (B, C, D, H, W)."""
    first, reach = x, net.pa_frames // 2
    x = x.permute(0, 2, 3, 4, 1)
    x1 = stage(net.stage1, x, flows, 0, reach)
    x2 = stage(net.stage2, x1, flows, 1, reach)
    x3 = stage(net.stage3, x2, flows, 2, reach)
    x4 = stage(net.stage4, x3, flows, 3, reach)
    x = stage(net.stage5, x4, flows, 2, reach)
    x = stage(net.stage6, x + x3, flows, 1, reach)
    x = stage(net.stage7, x + x2, flows, 0, reach) + x1
    x = net.stage8[0](x)
    for group in net.stage8[1:]:
        y = x
        for blk in group.residual_group.blocks:
            y = block(blk, y)
        x = x + group.linear(y)
    return first + net.conv_after_body(net.norm(x)).permute(0, 4, 1, 2, 3)


def forward(net: nn.Module, x: Tensor) -> Tensor:
    """The restored clip (B, D', C, H', W') of the clip ``x`` (B, D, C, H, W)."""
    if not net.pa_frames:
        mean = x.mean([1, 3, 4], keepdim=True)
        y = body(net, conv3d(net.conv_first, (x - mean).transpose(1, 2)), {})
        y = F.leaky_relu(net.linear_fuse(torch.cat(y.unbind(2), 1)), 0.2)
        return net.conv_last(F.pad(y, (3, 3, 3, 3), mode="reflect")).unsqueeze(1) + mean
    frames, noise = x[:, :, : net.in_chans], x[:, :, net.in_chans :]
    n = x.shape[1]
    flows = all_flows(net.spynet, frames, net.pa_frames // 2)
    zero = torch.zeros_like(frames[:, 0]).repeat(1, 4, 1, 1)
    after = [warp(frames[:, t + 1], flows[0, t, t + 1], "nearest4") for t in range(n - 1)] + [zero]
    before = [zero] + [warp(frames[:, t - 1], flows[0, t, t - 1], "nearest4") for t in range(1, n)]
    stacked = torch.cat([frames, torch.stack(after, 1), torch.stack(before, 1), noise], 2)
    y = body(net, conv3d(net.conv_first, stacked.transpose(1, 2)), flows)
    if net.upscale == 1:
        return conv3d(net.conv_last, y).transpose(1, 2) + frames
    y = F.leaky_relu(conv3d(net.conv_before_upsample[0], y))
    *convs, last = net.upsample.values()
    for conv, factor in zip(convs, net.upsample.factors, strict=True):
        y = F.pixel_shuffle(conv3d(conv, y).transpose(1, 2), factor).transpose(1, 2)
        y = F.leaky_relu(y, 0.1)
    y = conv3d(net.conv_last, conv3d(last, y)).transpose(1, 2)
    size = tuple(y.shape[2:])
    return y + F.interpolate(frames, size=size, mode="trilinear", align_corners=False)
